"""Autoscaling policies beside each other in a simulated cluster."""
