"""Whatever is given as a name, a command ends with a message, never with a traceback."""

import os
import subprocess
import sys

import pytest

from minimind_jax.cli import main
from minimind_jax.data.tokenizer import train_bpe

CONTENTS = {
    "binary.jsonl": bytes(range(256)),
    "empty.jsonl": b"",
    "list.jsonl": b'[1]\n3\n"a"\n',
    "null.jsonl": b'{"text": null}\n{"conversations": null}\n',
    "types.jsonl": b'{"conversations": [{"role": 1, "content": []}]}\n{"conversations": {"a": 1}}\n',
    "deep.jsonl": b"[" * 100_000,
    "cut.parquet": b"PAR1xxxx",
    "cut.jsonl.gz": b"\x1f\x8b\x08\x00",
    "cut.jsonl.zst": b"(\xb5/\xfd\x00",
    "nul.csv": b'text,label\na\x00b,c\n"d',
    "cut.pth": b"PK\x03\x04",
    "bad.yaml": b"a: [1",
    "list.yaml": b"- 1\n",
    "stages.yaml": b"stages: [sft, {dpo: 3}]\n",
    "runs/r/config.yaml": b"run: r\nseed: x\n",
    "runs/r/metrics.jsonl": b'{"step": 1}\n',
    "runs/q/config.yaml": b"{}",
    "runs/q/environment.json": b"[]",
    "short/config.json": b'{"model_type": "qwen3"}',
    "adapter/adapter_config.json": b'{"peft_type": "LORA"}',
}
NAMES = [
    *("", "gone", "folder.jsonl", "dangling.jsonl", "caf\udce9.jsonl", "short", "adapter", "runs/r", "r", "q", "tok"),
    *("*", "[a", "s3://x", "file:///x", "~nobody-here/x", "a" * 300, "-1", "nan", "你好"),
]
COMMANDS = [
    *("data inspect X --tokenizer tok", "data inspect null.jsonl --tokenizer X", "report X", "pipeline X"),
    *("convert from-hf X out", "convert to-hf X out", "convert to-hf X out --checkpoint newest", "plan sft --config X"),
    *("convert from-torch X out --tokenizer tok", "convert to-torch X out.pth", "convert merge-lora X out"),
    *("convert to-gguf X out", "convert to-gguf X out --adapter", "convert to-gguf X out --checkpoint newest"),
    *("evaluate perplexity --model X null.jsonl", "sft --config X", "tokenizer --data X --output out"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    train_bpe(["a small text"], root / "tok", 300)
    for name, content in CONTENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "folder.jsonl").mkdir()
    (root / "dangling.jsonl").symlink_to("nowhere")
    (root / "caf\udce9.jsonl").write_bytes(b"{}\n")
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_name_ends_in_a_message(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name in (*NAMES, *CONTENTS):
        try:
            status = main([name if word == "X" else word for word in command.split()])
        except SystemExit as error:  # argparse
            status = error.code
        printed = capsys.readouterr()
        assert status in (0, 2) and "Traceback" not in printed.err, (name, printed.err[-2000:])
        assert status == 0 or printed.err.strip(), name


def test_a_closed_standard_output_is_no_trouble():
    shown = subprocess.run(
        [sys.executable, "-c", "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
         "-m", "minimind_jax", "--version"],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert shown.returncode == 0 and "Traceback" not in shown.stderr
