"""What run.sh is asked for: checked before anything is made or fetched, then told to the shell.

    settings=$(python -m trivox.launch demo llm --steps 100) && eval "$settings"
"""

import os
import re
import shlex
import sys
from contextlib import redirect_stdout

import torch

from trivox.common import UserError, run
from trivox.recipes import TRAINERS, load_settings

USAGE = "./run.sh [test | demo] [flow | codec | llm] [--gpus N] [--max-restarts N] [--config FILE] [--key value …]"
# Of a CPU. glibc puts small objects into the gaps between tensors, and its cache of freed ones keeps such gaps open:
# free memory falls into ever more pieces, which each new tensor searches, until a step takes twice its time
TUNABLES = "glibc.malloc.tcache_count=0"
PUBLISHED = {"flow": "flow_ljspeech", "codec": "codec_ljspeech", "llm": "llm_177m"}


def read_arguments(argv, env):
    """The arguments of run.sh: whether it is a demo, its system if it was named, the config file, the number of GPUs
    and of restarts, the flags of the trainer. UserError for wrong ones."""
    demo = not argv or argv[0] == "demo"
    words = argv[demo:]
    system = words.pop(0) if words and words[0] in TRAINERS else None
    if words and not system and not words[0].startswith("--"):
        raise UserError(f"there is no {words[0]!r}: {USAGE}")
    name = f"{system or 'flow'}_demo" if demo else PUBLISHED[system or "flow"]
    own = {"--config": f"configs/{name}.yaml", "--gpus": env.get("NUM_GPUS") or "1", "--max-restarts": "3"}
    flags, words = [f"--batch_size={env['BATCH_SIZE']}"] if env.get("BATCH_SIZE") else [], iter(words)
    for word in words:
        key, equals, value = word.partition("=")
        if key not in own:
            flags.append(word)
        elif not (value := value if equals else next(words, "")):
            raise UserError(f"{key} needs a value")
        else:
            own[key] = value
    gpus, restarts = (whole(key, own[key], least, 10**9) for key, least in (("--gpus", 1), ("--max-restarts", 0)))
    return demo, system, no_flag(own["--config"]), gpus, restarts, flags


def whole(name, text, least, most):
    """The whole number that a text is, from `least` to `most`; UserError where it is none."""
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} takes a whole number from {least} to {most:,}, not {text!r}")
    return int(text)


def assignments(argv, env):
    """The run that is asked for, as a text for a shell to evaluate: variables mode, system, config, data_dir, run,
    closing, and the array command, which trains. UserError for wrong arguments."""
    demo, system, config, gpus, restarts, flags = read_arguments(argv, env)
    if {"-h", "--help"} & set(flags):
        return f"exec python {TRAINERS[load_settings(config, system).system]}.py --help\n"
    c, nodes = load_settings(config, system, flags), env.get("NNODES") or "1"
    command, lines = [f"{TRAINERS[c.system]}.py", "--config", config, "--resume", *flags], []
    found, threads = 0 if c.device in ("cpu", "mps") else torch.cuda.device_count(), 8
    if found == 0:
        lines.append(f"export GLIBC_TUNABLES=${{GLIBC_TUNABLES:-{TUNABLES}}}")
    if gpus == 1 and nodes == "1":
        command.insert(0, "python")
    else:
        if found == 0:
            whole("--gpus, where there is no GPU,", str(gpus), 1, max(64, os.cpu_count()))
            threads = -(-os.cpu_count() // gpus)
            lines.append(f"echo 'no GPU here: {gpus} processes share the CPU and talk over gloo'")
        elif gpus > found:
            raise UserError(f"--gpus {gpus}, but torch sees {found} on this machine")
        machines = ["--standalone"]
        if nodes != "1":
            for name, what in (("NODE_RANK", "the number of this machine, from 0"), ("MASTER_ADDR", "the first one's")):
                if not env.get(name):
                    raise UserError(f"NNODES is {nodes}, so set {name}, {what}")
            port = env.get("MASTER_PORT") or "29500"
            machines = whole("NNODES", nodes, 1, 10**5)
            whole("NODE_RANK", env["NODE_RANK"], 0, machines - 1)
            whole("MASTER_PORT", port, 1, 65535)
            machines = ["--nnodes", nodes, "--rdzv-backend", "c10d",  # which lets all machines start again together
                        "--rdzv-endpoint", f"{env['MASTER_ADDR']}:{port}",
                        "--rdzv-conf", f"is_host={int(int(env['NODE_RANK']) == 0)},read_timeout=600"]
        lines.append(f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}")
        command = ["python", "-m", "trivox.elastic", "--nproc-per-node", str(gpus), *machines,
                   "--max-restarts", str(restarts), *command]
    folder = no_flag(c.out_dir)
    values = {"mode": "demo" if demo else "train", "system": c.system, "config": config,
              "data_dir": no_flag(c.data_dir), "run": folder, "closing": closing(c, folder)}
    lines += [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, f"command=({shlex.join(command)})", ""])


def no_flag(path):
    """The path, which no program takes for a flag then."""
    return f"./{path}" if path.startswith("-") else path


def closing(c, folder):
    """What a demo says when it is done: what to listen to and to look at, and how to go on."""
    wavs = {"flow": "; beside each the recording, 000_reference.wav",
            "codec": f", {folder}/samples/step_…/; recordings through the codec are 000_reference.wav and on",
            "llm": "; beside each the recording through the codec, 000_reference.wav"}[c.system]
    coverage = f", {folder}/coverage.png" if c.system == "llm" else ""
    verb, what = "speak ", '--text "The captain painted seven wooden boxes yesterday."'
    if c.system == "codec" and not c.cross_every:
        verb, what = "sample", "--seconds 10 --temperature 0.8"
    if c.system == "llm" and c.speaker_width:
        what += f" --speaker {shlex.quote(f'{folder}/evaluation/000_reference.wav')}"
    return (f"\nlisten  {folder}/evaluation/000.wav and on{wavs}\n"
            f"look    {folder}/evaluation/000.png and on, {folder}/curves.png{coverage}\n"
            f"{verb}  .venv/bin/python sample.py --ckpt {shlex.quote(folder)} {what} --out out.wav")


def main(argv):
    with redirect_stdout(sys.stderr):  # whatever else is said is not for the shell to evaluate
        text = assignments(argv, os.environ)
    sys.stdout.buffer.write(os.fsencode(text))  # bytes, as a path may be no UTF-8


if __name__ == "__main__":
    run(main, sys.argv[1:])
