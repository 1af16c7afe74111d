"""The page in the browser, for a person with one old photo: `restore ui` (extra `ui`)."""

from restore.app.page.build import build_page, launch

__all__ = ["build_page", "launch"]
