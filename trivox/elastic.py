"""torchrun for run.sh: where a process dies, all start again, and go on from the last checkpoint.

    python -m trivox.elastic --nproc-per-node 2 --standalone --max-restarts 3 train_flow_tts.py --resume …

Nothing starts again where a signal asked for the end, or where the user has something to mend.
"""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial

from torch.distributed import run as torchrun
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from trivox.common import TO_MEND, UserError, run

SIGNALS = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
FINAL = {TO_MEND, *(128 + number for number in SIGNALS)}  # what `run` ends a process with on purpose
_asked = []  # the signals that asked this process to stop


class Agent(LocalElasticAgent):
    """It starts a machine's processes, watches them, and starts them again."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        signal.signal(signal.SIGTERM, self.hand_on)
        meeting = self._worker_group.spec.rdzv_handler
        meeting.num_nodes_waiting = partial(self.newcomers, meeting.num_nodes_waiting)
        self.connected = True

    def newcomers(self, waiting):
        """The machines that wait to join, for which all start again. None where the machines' meeting place is gone:
        the processes here may still be saving, and notice by themselves what they miss."""
        try:
            return waiting() if self.connected else 0
        except rendezvous.RendezvousConnectionError:
            self.connected = False
            return 0

    def hand_on(self, number, frame):
        """The processes end their step, save and leave; where there are none yet, or no more, this one does."""
        self._remaining_restarts, reached = 0, []
        _asked.append(number)
        for process in self._pcontext.pids().values() if self._pcontext else ():
            with suppress(ProcessLookupError):
                reached.append(os.kill(process, number))
        if not reached:
            sys.exit(128 + number)

    def _monitor_workers(self, group):
        found, most = super()._monitor_workers(group), group.spec.max_restarts
        if found.is_failed() and {failure.exitcode for failure in found.failures.values()} & FINAL:
            self._remaining_restarts = 0
        elif found.is_failed() and self._remaining_restarts:
            print(f"\nnote: {told(found.failures)}; all processes start again from the last checkpoint (restart "
                  f"{most - self._remaining_restarts + 1} of {most})", file=sys.stderr)
        return found


def told(failures):
    """What became of the first of some processes, {rank: ProcessFailure}; the agent has ended the others by SIGTERM."""
    rank, failure = min(failures.items(), key=lambda item: (
        item[1].timestamp, item[1].exitcode == -signal.SIGTERM, item[1].exitcode))
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"process {rank} {how}"


def own_address(host, port):
    """By which the machines that meet at a host and port reach this one: its name may mean nothing to them. UserError
    where there is no such host."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # which sends nothing
            return probe.getsockname()[0]
    except OSError as e:
        raise UserError(f"cannot reach MASTER_ADDR {host}: {e.strerror}") from None


def main(argv):
    """Returns where all processes have ended with 0; else leaves with the status of one that has not."""
    logging.disable(logging.ERROR)  # torchrun's own account of what is said here in a sentence
    # A store of its own for each restart: in that which torchrun shares, processes find the addresses of dead ones, and
    # wait for them (https://github.com/pytorch/pytorch/issues/135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of warnings where a process misses another
    for number in SIGNALS:  # not SIG_IGN, which the processes would inherit
        signal.signal(number, lambda *_: None)
    api.LocalElasticAgent = Agent
    args = torchrun.parse_args(["--signals-to-handle", "SIGQUIT", *argv])
    if args.rdzv_endpoint:
        args.local_addr = own_address(*args.rdzv_endpoint.rsplit(":", 1))
    try:
        torchrun.run(args)
    except ChildFailedError as e:
        codes = {failure.exitcode for failure in e.failures.values()}
        if TO_MEND in codes:
            sys.exit(1)  # and the process has said why
        if stopped := [*(codes & FINAL), *(128 + number for number in _asked)]:
            sys.exit(stopped[0])
        raise UserError(f"{told(e.failures)}, and no restart is left: the same command goes on from the last "
                        "checkpoint") from None
    except rendezvous.RendezvousClosedError:
        raise UserError("another machine has ended the run, and says why") from None
    except (rendezvous.RendezvousConnectionError, rendezvous.RendezvousTimeoutError) as e:
        raise UserError(f"the machines do not find each other, or no more: {e}") from None


if __name__ == "__main__":
    run(main, sys.argv[1:])
