"""The example of docs/tools.md: what it says is printed, is."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "tools.md"


def test_the_function_of_ones_own_works_as_written(tmp_path):
    text = GUIDE.read_text(encoding="utf-8")
    shop, program = re.findall(r"```python\n(.*?)```", text, re.S)
    printed = re.search(r"```\n\n((?:    .*\n)+)", text.partition("Toolbox")[2])[1]
    (tmp_path / "shop.py").write_text(shop, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == re.sub(r"^    ", "", printed, flags=re.M), done.stderr
