"""What each subcommand of ``dibit`` does; imported only when it runs, as they need heavy libraries."""
