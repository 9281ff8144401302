"""Downloads from a real HTTP server on this machine that answers as Hugging Face and ModelScope do."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading

import pytest

from minimind_jax.config.tools import DownloadConfig
from minimind_jax.data.download import FILES, file_names, run
from minimind_jax.errors import UserError

CONTENT = {name: (f'{{"text": "{name}"}}\n' * 20_000).encode() for name in ("rlaif.jsonl", "dpo.jsonl")}
HUGGINGFACE = "/datasets/jingyaogong/minimind_dataset/resolve/main/"
MODELSCOPE = "/api/v1/datasets/gongjy/minimind_dataset/repo?Revision=master&FilePath="
MODELSCOPE_LIST = "/api/v1/datasets/gongjy/minimind_dataset/repo/tree?"


class Hub(http.server.ThreadingHTTPServer):
    """Serves CONTENT; cut_after: bytes after which every answer breaks off; requests: what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.cut_after: int | None = None
        self.content = dict(CONTENT)
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that goes away is no error here."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.path.startswith(MODELSCOPE_LIST):
            self.list_files()
            return
        prefix = next((p for p in (HUGGINGFACE, MODELSCOPE) if self.path.startswith(p)), None)
        content = self.server.content.get(self.path.removeprefix(prefix)) if prefix else None
        if content is None:
            self.send_response(404)
            if self.path.startswith(HUGGINGFACE):
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            cut = self.server.cut_after
            self.wfile.write(content[start:] if cut is None else content[start : start + cut])
            if cut is not None:
                self.close_connection = True

    def list_files(self):
        files = [
            {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.server.content.items()
        ]
        answer = json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def modelscope(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("modelscope")
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    return hub


def asked_of(hub):
    """(file, place it was asked from) of what was downloaded from ModelScope."""
    found = ((path.removeprefix(MODELSCOPE), start) for _, path, start in hub.requests if path.startswith(MODELSCOPE))
    return [(name, int((start or "bytes=0-")[6:-1])) for name, start in found]


def run_huggingface(endpoint, *arguments, **more):
    """In a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    code = (
        "import sys\n"
        "from minimind_jax.config.tools import DownloadConfig\n"
        "from minimind_jax.data.download import run\n"
        "from minimind_jax.errors import UserError\n"
        "try: run(DownloadConfig(sys.argv[1:-1], sys.argv[-1]))\n"
        "except UserError as error: sys.exit(f'UserError: {error}')\n"
    )
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": "",
        **more,
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_names_of_files():
    assert file_names(["mini"]) == ["pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"]
    assert file_names(["all"]) == list(FILES)
    assert file_names(["dpo", "dpo.jsonl", "lora_exam.jsonl"]) == ["dpo.jsonl", "lora_exam.jsonl"]


def test_huggingface_through_a_mirror(hub, tmp_path):
    result = run_huggingface(hub.url, "rlaif", "dpo.jsonl", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    for name, content in CONTENT.items():
        assert (tmp_path / "data" / name).read_bytes() == content
        assert str(tmp_path / "data" / name) in result.stdout
    assert {path for _, path, _ in hub.requests} == {HUGGINGFACE + name for name in CONTENT}


def test_huggingface_names_the_files_there_are(hub, tmp_path):
    result = run_huggingface(hub.url, "nothing", tmp_path)
    assert "has no file nothing.jsonl; MiniMind's files are pretrain_t2t_mini.jsonl" in result.stderr


@pytest.mark.parametrize("switched_off", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_huggingface_without_a_connection_says_what_to_do(hub, tmp_path, switched_off):
    hub.shutdown()
    hub.server_close()
    result = run_huggingface(hub.url, "rlaif", tmp_path, **({"HF_HUB_OFFLINE": "1"} if switched_off else {}))
    assert "UserError" in result.stderr and "cannot be reached" in result.stderr
    assert "HF_ENDPOINT" in result.stderr and "--source modelscope" in result.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def download(name, target):
    run(DownloadConfig((name,), str(target), "modelscope"))


def test_modelscope_files(modelscope, tmp_path, capsys):
    target = tmp_path / "data"
    download("rlaif", target)
    assert capsys.readouterr().out.splitlines()[-1] == str(target / "rlaif.jsonl")
    assert (target / "rlaif.jsonl").read_bytes() == CONTENT["rlaif.jsonl"]
    assert asked_of(modelscope) == [("rlaif.jsonl", 0)]
    assert [path.name for path in target.iterdir()] == ["rlaif.jsonl"]


def test_a_lost_server_leaves_a_part_that_the_next_call_completes(modelscope, tmp_path):
    modelscope.cut_after = 150_000
    with pytest.raises(UserError, match=r"(?s)cannot be reached.*What has arrived is kept"):
        download("rlaif", tmp_path)
    assert not (tmp_path / "rlaif.jsonl").exists()
    modelscope.cut_after = None
    modelscope.requests.clear()
    download("rlaif", tmp_path)
    assert (tmp_path / "rlaif.jsonl").read_bytes() == CONTENT["rlaif.jsonl"]
    assert asked_of(modelscope) == [("rlaif.jsonl", 150_000)]


def test_a_complete_file_is_not_downloaded_again_and_a_changed_one_is(modelscope, tmp_path):
    download("dpo", tmp_path)
    path = tmp_path / "dpo.jsonl"
    made = path.stat().st_mtime_ns
    download("dpo", tmp_path)
    assert path.stat().st_mtime_ns == made
    modelscope.content["dpo.jsonl"] = b'{"text": "new"}\n'
    download("dpo", tmp_path)
    assert path.read_bytes() == b'{"text": "new"}\n'


def test_modelscope_errors_say_what_to_do(modelscope, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no file nothing\.jsonl; MiniMind's files are"):
        download("nothing", tmp_path)
    with pytest.raises(ValueError, match="it must be huggingface or modelscope"):
        DownloadConfig(source="elsewhere")
    modelscope.shutdown()
    modelscope.server_close()
    with pytest.raises(UserError, match=r"(?s)cannot be reached.*check the connection"):
        download("rlaif", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make this folder"):
        download("rlaif", tmp_path / "file")
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(UserError, match=r"needs the package modelscope: .*pip install"):
        download("rlaif", tmp_path)
