"""HeadHunter: which attention heads to perturb, found by greedy search (arXiv 2506.10978)."""

from restore.search.heads import Found, Plan, heads, plan

__all__ = ["Found", "Plan", "heads", "plan"]
