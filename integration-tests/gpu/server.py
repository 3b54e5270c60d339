#!/usr/bin/env python3
"""The patched server on a GPU, through HTTP: what a real model answers.

    server.py MISTRALRS answers --gguf FILE [--spec SPEC ...]

`host` is the host's own paged cache in f16. Needs nothing but Python; docs/kernels.md has the results. How fast it answers is
measured by `cargo load-kv` (docs/benchmarks.md).
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HOST = "127.0.0.1"


def free_port():
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


class Server:
    """`mistralrs serve` with one cache, until the `with` block ends."""

    def __init__(self, program, spec, arguments):
        cache = [] if spec == "host" else ["--kv-cache", spec]
        self.port = free_port()
        self.log = tempfile.NamedTemporaryFile("w+", prefix="mistralrs-", suffix=".log", delete=False)
        command = [program, "--token-source", "none", "serve", "--host", HOST, "-p", str(self.port), *cache, *arguments]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        start = time.time()
        while True:
            try:
                socket.create_connection((HOST, self.port), 1).close()
                break
            except OSError:
                if self.process.poll() is not None or time.time() - start > 240:
                    self.process.kill()
                    sys.exit(f"{' '.join(command)}: not ready\n{self.words()[-3000:]}")
                time.sleep(0.1)
        self.seconds = time.time() - start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def words(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", Path(self.log.name).read_text(errors="replace"))

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection(HOST, self.port, timeout=240)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def json(self, method, path, body=None):
        answer = self.request(method, path, body)
        text = answer.read().decode()
        if answer.status != 200:
            raise RuntimeError(f"{path}: status {answer.status}: {text[:500]}")
        return json.loads(text)

    def cache(self):
        """What the server tells of its cache; nothing of the host's own."""
        answer = self.request("GET", "/v1/kv_cache")
        text = answer.read().decode()
        return json.loads(text)["data"][0] if answer.status == 200 else {}


QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
]


def answers(args):
    """The same questions, greedily, of each cache: alone, and all at once."""
    path = Path(args.gguf).resolve()
    arguments = ["--format", "gguf", "-m", str(path.parent), "-f", path.name, "--pa-context-len", "4096", "--prefix-cache-n", "0", *args.more]
    # Long enough that most of it is quantized.
    text = " ".join(f"Entry {i}: the lamp in room {i} is {['red', 'green', 'blue'][i % 3]}." for i in range(60))
    questions = QUESTIONS + [f"{text}\n\nSummarise these entries in one sentence."]

    def body(question):
        message = {"role": "user", "content": question}
        return {"model": "default", "messages": [message], "temperature": 0, "max_tokens": args.tokens}

    for spec in args.spec:
        with Server(args.mistralrs, spec, arguments) as server:
            alone = [server.json("POST", "/v1/chat/completions", body(q)) for q in questions]
            found = [None] * len(questions)

            def ask(i, server=server, found=found):
                found[i] = server.json("POST", "/v1/chat/completions", body(questions[i]))

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(f"\n## {spec} (ready after {server.seconds:.1f} s)")
            for answer, again in zip(alone, found):
                said, repeated = (a["choices"][0]["message"]["content"] for a in (answer, again))
                same = "the same beside others" if said == repeated else f"BESIDE OTHERS: {repeated!r}"
                usage = answer["usage"]
                print(f"- {usage['prompt_tokens']} tokens, {usage['avg_compl_tok_per_sec']:.1f} tok/s: {said!r}; {same}")
            told = server.cache()
            names = ["spec", "setting", "bits_per_number", "bytes_granted", "bytes_held", "tokens", "hit_tokens", "failed_steps"]
            print(json.dumps({name: told.get(name) for name in names}))
            for line in server.words().splitlines():
                if any(word in line for word in ("KV-cache backend", "OTT cache", "on the GPU", "ERROR", "panicked")):
                    print("    " + line.strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mistralrs", help="the patched host's command line, built with the features ott and cuda")
    tasks = parser.add_subparsers(required=True)
    a = tasks.add_parser("answers")
    a.set_defaults(run=answers)
    a.add_argument("--gguf", required=True)
    a.add_argument("--tokens", type=int, default=48)
    a.add_argument("--spec", nargs="+", default=["host", "ott"])
    a.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of the server")
    args = parser.parse_args()
    os.environ.setdefault("RUST_LOG", "info")
    args.run(args)


if __name__ == "__main__":
    main()
