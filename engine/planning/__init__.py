"""What a model needs of which GPUs, from its shapes alone: `dibit plan` without loading anything."""
