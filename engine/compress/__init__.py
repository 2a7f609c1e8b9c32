"""The encoders, offline: weights in, tensors of a checkpoint out. Serving needs none of this."""
