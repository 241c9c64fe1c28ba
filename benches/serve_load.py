#!/usr/bin/env python3
"""Loads `fewbit serve` as many clients do, with OpenAI's own client, and with clients that misbehave.

    python benches/serve_load.py --fewbit target/release/fewbit --model MODEL [--requests 200] [--tokens 32] [--serve ARG ...]

Starts a server, asks for one greedy text alone, then for `--requests` texts at once; one in ten of these is cut after
its first piece, and as many malformed bodies come in between. Prints what came back, tokens a second and latencies;
ends with 1 where a text differs from the lone one, a malformed body is not refused, or the server is gone.
PYTHON needs the package openai.
"""

import argparse
import http.client
import statistics
import subprocess
import sys
import threading
import time

import openai

MALFORMED = [b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"model": "m", "prompt": {}}', b""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fewbit", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    command = [args.fewbit, "serve", "--model", args.model, "--port", "0", "--queue", str(args.requests), *args.serve]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = server.stdout.readline().rsplit("http://", 1)[1].strip()
    client = openai.OpenAI(base_url=f"http://{address}", api_key="none", timeout=600, max_retries=0)
    name = client.models.list().data[0].id
    ask = {"model": name, "prompt": "One day, a girl", "temperature": 0, "max_tokens": args.tokens}

    begin = time.monotonic()
    whole = client.completions.create(**ask)
    alone = time.monotonic() - begin
    expected = whole.choices[0].text
    print(f"alone: {whole.usage.completion_tokens} tokens in {alone:.2f} s")

    results, lock = [], threading.Lock()

    def one(index):
        begin, kind = time.monotonic(), "whole" if index % 2 else "stream"
        try:
            if index % 10 == 0:
                kind = "cut"
                stream = client.completions.create(**ask, stream=True)
                next(iter(stream))
                stream.close()
                text, tokens = expected, 0
            elif kind == "stream":
                pieces = client.completions.create(**ask, stream=True)
                text, tokens = "".join(piece.choices[0].text for piece in pieces if piece.choices), args.tokens
            else:
                answer = client.completions.create(**ask)
                text, tokens = answer.choices[0].text, answer.usage.completion_tokens
            outcome = "same" if text == expected else "different"
        except openai.APIError as error:
            outcome, tokens = type(error).__name__, 0
        with lock:
            results.append((kind, outcome, tokens, time.monotonic() - begin))

    def malformed(index):
        connection = http.client.HTTPConnection(address.split("/")[0], timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", MALFORMED[index % len(MALFORMED)], headers)
        status = connection.getresponse().status
        with lock:
            results.append(("malformed", str(status), 0, 0.0))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(args.requests)]
    threads += [threading.Thread(target=malformed, args=(index,)) for index in range(args.requests // 10)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begin

    counts = {}
    for kind, outcome, _, _ in results:
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:<10} {outcome:<12} {count}")
    tokens = sum(tokens for _, _, tokens, _ in results)
    waits = sorted(wait for kind, _, _, wait in results if kind in ("whole", "stream"))
    print(f"{args.requests} requests in {took:.1f} s, {tokens / took:.0f} tokens/s in all", end="; ")
    print(f"answers after {statistics.median(waits):.2f} s (median), {waits[-1]:.2f} s (longest)")
    lives = server.poll() is None
    server.terminate()
    code = server.wait(timeout=60)
    print(f"server ended with {code}")
    right = {("whole", "same"), ("stream", "same"), ("cut", "same"), ("malformed", "400"), ("malformed", "404")}
    return 0 if lives and code == 143 and set(counts) <= right else 1


if __name__ == "__main__":
    sys.exit(main())
