"""What there is to see of a running application: metrics, traces, live state."""
