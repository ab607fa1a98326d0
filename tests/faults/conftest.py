"""What the tests of strangers' files and of bad settings share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tools(base, tmp_path_factory) -> Path:
    """A folder with a tokenizer, tok, a packed source, legal, and a model, base."""
    folder = tmp_path_factory.mktemp("tools")
    for name, target in (("tok", base[0] / "tok"), ("legal", base[0] / "legal"), ("base", base[1])):
        (folder / name).symlink_to(target)
    return folder
