"""HeadHunter: greedy search for the attention heads to perturb (arXiv 2506.10978)."""

from restore.search.heads import SearchPlan, SearchResult, plan_search, search_heads

__all__ = ["SearchPlan", "SearchResult", "plan_search", "search_heads"]
