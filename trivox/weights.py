"""Published weights: put into weights/ by hand, in the Hugging Face hub's cache, or downloaded from it."""

import os
from pathlib import Path

from trivox.common import UserError


def by_hand(repo):
    """The folder in which a repository's files are looked for first: weights/<repo's name>, or below TRIVOX_WEIGHTS."""
    return Path(os.environ.get("TRIVOX_WEIGHTS", "weights")) / repo.rstrip("/").split("/")[-1]


def weight_files(repo):
    """[name, bytes, time of the last change] of each file of weights where `pretrained` finds a repository in a folder:
    what is there may become another. Those of the hub do not, and are none."""
    folder = by_hand(repo) if by_hand(repo).exists() else Path(repo)
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def pretrained(load, repo, what, files):
    """load(repo or its folder), with one of transformers' `from_pretrained`s as `load`.

    Raises UserError, which names `what` and says which `files` to get and where to put them.
    """
    folder = by_hand(repo)
    try:
        return load(folder if folder.exists() else repo)
    except Exception as e:  # offline, moved, damaged: each its own class
        raise UserError(f"cannot load {what} ({type(e).__name__}): get {files} from https://huggingface.co/{repo}/tree/"
                        f"main and put them into {folder}/") from None


def hub_file(repo, name, size):
    """The local path of a file of a Hugging Face repository: weights/<repo's name>/<file> if put there by hand, else
    the hub's cache or a download. Raises UserError that says where to get the file and where to put it."""
    local = by_hand(repo) / name
    if local.exists():
        return local
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, name)
    except Exception as e:  # offline, moved, refused: each its own exception class
        raise UserError(f"cannot download {name} ({size}) of {repo} ({type(e).__name__}); get it from "
                        f"https://huggingface.co/{repo}/resolve/main/{name} and put it at {local}") from None
