from model_fixtures import random_checkpoint, rank_pool

__all__ = ["random_checkpoint", "rank_pool"]
