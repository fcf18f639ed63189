import re
from pathlib import Path

import pytest

from pipeline.manifest import Manifest

README = Path(__file__).parents[1] / "README.md"


def test_its_python_runs(
    shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(shards[0].parent)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("0 (16, 1, 224, 224) (16, 14) 0.")
