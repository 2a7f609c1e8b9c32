from model_fixtures import rank_pool

__all__ = ["rank_pool"]
