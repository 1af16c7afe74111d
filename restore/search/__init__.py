"""HeadHunter: greedy search for the attention heads to perturb (arXiv 2506.10978)."""

from restore.search.gallery import SHEETS, draw_gallery
from restore.search.heads import SearchResult, search_heads
from restore.search.plan import SearchPlan, plan_search, pull_search

__all__ = ["SHEETS", "draw_gallery", "SearchPlan", "SearchResult", "plan_search", "pull_search", "search_heads"]
