"""Who may use the server, and how much: API keys, limits, request ids, access logs."""
