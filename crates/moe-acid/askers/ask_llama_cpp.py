"""Asks llama.cpp, by way of the package xllamacpp: the log-probabilities of every probe, as
`moe-runner acid read` takes them.

    moe-runner acid write acid --form gguf-f32
    python ask_llama_cpp.py acid/mixtral-gguf-f32 > mixtral.json
    moe-runner acid read mixtral.json
"""

import argparse
import json

import xllamacpp


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("checkpoint", help="a folder that `moe-runner acid write` wrote, in a form of GGUF")
    arguments.add_argument("--file", help="another file than the folder's model.gguf")
    arguments = arguments.parse_args()
    with open(f"{arguments.checkpoint}/probes.json") as file:
        probes = json.load(file)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.file or f"{arguments.checkpoint}/model.gguf"
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    rows = []
    for token in probes["prompt"]:
        request = {"prompt": [token], "max_tokens": 1, "logprobs": probes["tokens"], "temperature": 0}
        answer = server.handle_completions({**request, "cache_prompt": False})
        row = [None] * probes["tokens"]
        for said in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[said["id"]] = said["logprob"]
        rows.append(row)
    engine = f"llama.cpp of xllamacpp {xllamacpp.__version__}, {probes['form']}"
    print(json.dumps({"family": probes["family"], "engine": engine, "log_probabilities": rows}))


if __name__ == "__main__":
    main()
