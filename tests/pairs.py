"""Commands in processes of their own, one or two that form a JAX cluster, as on two hosts with a shared disk."""

import os
import signal
import socket
import subprocess
import sys
import time

from minimind_jax.training.tracking import read_metrics


def start_pair(folder, *arguments):
    """`minimind ARGUMENTS` in each of two processes with one device each. folder: theirs, or one for each."""
    folders = folder if isinstance(folder, list) else [folder] * 2
    cluster = ["--coordinator_address", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minimind_jax", *arguments, *cluster, "--process_id", str(index)],
            env={**os.environ, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_PLATFORMS": "cpu"},
            cwd=folders[index],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_one(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "minimind_jax", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(processes, *codes):
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode in codes for process in processes), "\n----\n".join(texts)
    return texts


def kill_after(run, step, processes):
    """SIGKILLs the processes once the metrics hold `step`."""
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(run.metrics_file)):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            outputs(processes, "still running")
        time.sleep(0.01)
    for process in processes:
        process.kill()
    outputs(processes, -signal.SIGKILL)
