from model_fixtures import random_checkpoint

__all__ = ["random_checkpoint"]
