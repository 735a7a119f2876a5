"""What training's tests share: compiled programs are kept, and compiled quickly."""

from tests.train.conftest import cache_dir  # noqa: F401
