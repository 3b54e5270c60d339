#!/usr/bin/env python3
"""The patched server on a GPU, through HTTP: what a real model answers, and tokens per second in a fixed KV budget.

    server.py MISTRALRS answers --gguf FILE [--spec SPEC ...]
    server.py MISTRALRS speed [--layers 32 ...] [--depth 4096] [--budget 4096] [--spec SPEC ...]

`speed` needs no model: it makes one of random weights in Llama 3.1 8B's shape, since time does not depend on what weights
say. `host` is the host's own paged cache in f16. Needs nothing but Python; docs/kernels.md has the results.
"""

import argparse
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import struct
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


def save(path, shapes, pattern):
    """A safetensors file of bf16 tensors, all of the same few random numbers over and over."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= file.write(pattern[:end])


def make_model(args, folder):
    """Random weights in the shape that is asked for, and a tokenizer of plain words."""
    hidden, kv, head_dim = args.hidden, args.kv_heads, args.hidden // args.heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": args.ffn, "num_hidden_layers": args.layers, "head_dim": head_dim,
        "num_attention_heads": args.heads, "num_key_value_heads": kv, "vocab_size": args.vocabulary,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }
    words = {f"w{i}": i for i in range(args.vocabulary)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w2"},
    }
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "w1", "bos_token": "w0"}))
    # bf16 is the upper half of an f32. A prime number of them, so that rows differ.
    draw = random.Random(1)
    few = b"".join(struct.pack("<f", draw.gauss(0, 0.02))[2:] for _ in range(65537))
    pattern = few * 256
    ends = {"model.embed_tokens.weight": [args.vocabulary, hidden], "lm_head.weight": [args.vocabulary, hidden],
            "model.norm.weight": [hidden]}
    name = "model-{:05}-of-{:05}.safetensors"
    save(folder / name.format(args.layers + 1, args.layers + 1), ends, pattern)
    for i in range(args.layers):
        shapes = {
            "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [args.heads * head_dim, hidden], "self_attn.k_proj": [kv * head_dim, hidden],
            "self_attn.v_proj": [kv * head_dim, hidden], "self_attn.o_proj": [hidden, args.heads * head_dim],
            "mlp.gate_proj": [args.ffn, hidden], "mlp.up_proj": [args.ffn, hidden], "mlp.down_proj": [hidden, args.ffn],
        }
        layer = {f"model.layers.{i}.{part}.weight": shape for part, shape in shapes.items()}
        save(folder / name.format(i + 1, args.layers + 1), layer, pattern)


class Clock:
    """When each token of each sequence came."""

    def __init__(self):
        self.times, self.lock, self.errors = {}, threading.Lock(), []

    def stream(self, server, key, prompt, tokens, n, started=None):
        body = {"model": "default", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "n": n}
        try:
            answer = server.request("POST", "/v1/completions", body)
            if answer.status != 200:
                raise RuntimeError(answer.read().decode()[:300])
            for line in answer:
                line = line.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                with self.lock:
                    for choice in event["choices"]:
                        self.times.setdefault((key, choice["index"]), []).append(time.time())
                if started:
                    started.set()
        except Exception as error:  # noqa: BLE001: told at the end
            self.errors.append(repr(error))
        finally:
            if started:
                started.set()

    def rate(self):
        """Tokens per second of all sequences, while all of them were decoding."""
        begin = max(times[0] for times in self.times.values())
        end = min(times[-1] for times in self.times.values())
        count = sum(begin < t <= end for times in self.times.values() for t in times)
        return count / (end - begin) if end > begin else float("nan")


def prompt_of(depth, seed, vocabulary):
    return " ".join(f"w{3 + (seed * 7919 + i * 104729 + i * i * 31) % (vocabulary - 3)}" for i in range(depth))


def measure(server, args, sequences, how):
    clock, start = Clock(), time.time()
    if how == "at once":
        clock.stream(server, 0, prompt_of(args.depth, 1, args.vocabulary), args.tokens, sequences)
        first = max(times[0] for times in clock.times.values()) - start if clock.times else float("nan")
    else:
        # Each comes when the one before it has its first token; the first ones are asked for more tokens.
        threads = []
        for i in range(sequences):
            started = threading.Event()
            tokens = args.tokens + 4 * (sequences - i)
            prompt = prompt_of(args.depth, i + 1, args.vocabulary)
            thread = threading.Thread(target=clock.stream, args=(server, i, prompt, tokens, 1, started))
            thread.start()
            threads.append(thread)
            started.wait()
        first = time.time() - start
        for thread in threads:
            thread.join()
    if clock.errors or len(clock.times) != sequences:
        return {"sequences": sequences, "how": how, "answered": len(clock.times), "errors": clock.errors[:2]}
    told = server.cache()
    return {"sequences": sequences, "how": how, "prompts_seconds": round(first, 2), "tokens_per_second": round(clock.rate(), 1),
            "bytes_held_mib": round(told.get("bytes_held", 0) / 2**20), "preempted": told.get("preempted")}


def speed(args):
    """Decoded tokens per second behind `depth` tokens, in a budget: as many sequences as fit f16, then more."""
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        start = time.time()
        make_model(args, folder)
        print(f"made {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.1f} GB of weights in {time.time() - start:.0f} s", flush=True)
    per_token = 2 * args.layers * args.kv_heads * (args.hidden // args.heads) * 2
    blocks = -(-(args.depth + args.tokens + 32) // 32) * 32
    fits = args.budget * 2**20 // (per_token * blocks)
    arguments = ["-m", str(folder), "--prefix-cache-n", "0", "--pa-memory-mb", str(args.budget), *args.more]
    print(f"{args.budget} MiB for the cache: f16 holds {fits} sequences of {args.depth} + {args.tokens} tokens", flush=True)
    results = []
    for spec in args.spec:
        counts = [(fits, "at once")] + ([] if spec == "host" else [(n, "one after the other") for n in args.sequences])
        most = max(n for n, _ in counts)
        with Server(args.mistralrs, spec, [*arguments, "--max-seqs", str(most)]) as server:
            for line in server.words().splitlines():
                if any(word in line for word in ("KV-cache backend", "OTT cache", "on the GPU", "Allocating", "pool:", "besides")):
                    print("    " + line.strip(), flush=True)
            measure(server, argparse.Namespace(**{**vars(args), "depth": 256, "tokens": 8}), 2, "at once")
            for sequences, how in counts:
                result = {"cache": spec, "ready_seconds": round(server.seconds, 1), **measure(server, args, sequences, how)}
                results.append(result)
                print(json.dumps(result), flush=True)
            if server.process.poll() is not None:
                print(server.words()[-2000:], flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mistralrs", help="the patched host's command line, built with the features ott and cuda")
    tasks = parser.add_subparsers(required=True)
    a = tasks.add_parser("answers")
    a.set_defaults(run=answers)
    a.add_argument("--gguf", required=True)
    a.add_argument("--tokens", type=int, default=48)
    s = tasks.add_parser("speed")
    s.set_defaults(run=speed)
    for name, value in [("layers", 32), ("hidden", 4096), ("ffn", 14336), ("heads", 32), ("kv-heads", 8),
                        ("vocabulary", 32000), ("depth", 4096), ("tokens", 64), ("budget", 4096)]:
        s.add_argument(f"--{name}", type=int, default=value)
    s.add_argument("--sequences", type=int, nargs="*", default=[32])
    s.add_argument("--folder", help="where the model is kept; a new one by default")
    s.add_argument("--out", help="results as JSON")
    for task in (a, s):
        task.add_argument("--spec", nargs="+", default=["host", "ott"])
        task.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of the server")
    args = parser.parse_args()
    os.environ.setdefault("RUST_LOG", "info")
    args.run(args)


if __name__ == "__main__":
    main()
