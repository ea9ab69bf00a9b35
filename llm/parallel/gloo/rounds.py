"""The round trip of a collective: every rank says what it calls and brings its numbers.

Rank 0 of the group collects both from all ranks, makes the result and sends it back. That is the
whole transport: a rehearsal has its ranks on one machine, where a ring would save nothing, and rank
0 sees everything. It finds ranks that call something else, that are late, or that ended, and every
rank's message names them. (Native gloo hangs for 30 seconds, or adds up unrelated memory.)

Reductions go in the order of ranks, so that their result is the same in every run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from llm.parallel.gloo import links
from llm.parallel.gloo.links import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    Member,
    PeerLostError,
)

PURPOSE = "collectives"
_MARGIN_S = 5.0  # others wait longer than rank 0, whose message says more
_NOTHING = np.empty(0, np.uint8)

# Takes the numbers of rank 0, 1, … in turn; what it returned for the last one is the result.
Combine = Callable[[int, np.ndarray], np.ndarray]


def open_links(member: Member, listener: links.Listener, timeout_s: float) -> None:
    """Connect the ranks of a new group to its rank 0."""
    if member.index == 0:
        for peer in range(1, len(member.peers)):
            try:
                link = listener.take((member.label, PURPOSE, peer), timeout_s)
            except TimeoutError as late:
                raise CollectiveTimeoutError(
                    f"new_group: {member.title(peer)} did not come within {timeout_s:g} s"
                ) from late
            link.settimeout(timeout_s)
            member.links[peer] = link
    else:
        link = links.connect(member.peers[0], (member.label, PURPOSE, member.index))
        link.settimeout(timeout_s + _MARGIN_S)
        member.links[0] = link


def agree(member: Member, call: str, own: Any = None) -> list[Any]:
    """Wait until all ranks make the same ``call``; return each rank's ``own`` (JSON-able).

    Raises:
        CollectiveMismatchError: ranks called different collectives.
        CollectiveTimeoutError: a rank did not arrive in time.
        PeerLostError: a rank ended.
    """
    return _exchange(member, call, own, _NOTHING, lambda _, values: values)[0]


def exchange(
    member: Member, call: str, values: np.ndarray, combine: Combine, *, to: int | None = None
) -> np.ndarray:
    """Bring ``values``, get what ``combine`` makes of those of all ranks; raises as :func:`agree`.

    Args:
        member: this process in the group.
        call: which collective, with everything that has to be the same on all ranks.
        values: this rank's numbers. Their type and size may only differ where ``call`` differs.
        combine: used on rank 0 of the group, and only if all ranks made the same call.
        to: the one rank that gets the result, the others nothing; all of them where that is None.
    """
    return _exchange(member, call, None, np.ascontiguousarray(values), combine, to)[1]


def _exchange(
    member: Member,
    call: str,
    own: Any,
    values: np.ndarray,
    combine: Combine,
    to: int | None = None,
) -> tuple[list[Any], np.ndarray]:
    if member.index == 0:
        answer, result = _collect(member, call, own, values, combine, to)
    else:
        answer, result = _report(member, call, own, values)
    if answer["lost"]:
        _raise_lost(member, call, answer["lost"])
    rows = answer["rows"]
    if any(row[0] != rows[0][0] for row in rows):
        called = "; ".join(f"{member.title(rank)}: {row[0]}" for rank, row in enumerate(rows))
        raise CollectiveMismatchError(f"ranks of {member} called different collectives: {called}")
    return [row[1] for row in rows], result


def _collect(
    member: Member, call: str, own: Any, values: np.ndarray, combine: Combine, to: int | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Rank 0's side."""
    rows: list[Any] = [[call, own]]
    lost: dict[int, str] = {}
    result = combine(0, values)
    for peer, link in member.links.items():
        rows.append(None)
        try:
            *row, kind, size = links.receive(link)
            rows[-1] = row
            brought = np.empty(size, kind)
            links.receive_into(link, links.as_bytes(brought))
            if row[0] == call:
                result = combine(peer, brought)
        except TimeoutError:
            lost[peer] = f"did not arrive within {link.gettimeout():g} s"
        except EOFError:
            lost[peer] = "ended"
    agreed = not lost and all(row[0] == call for row in rows)
    result = np.ascontiguousarray(result) if agreed else _NOTHING
    # JSON has no integer keys.
    answer = {"rows": rows, "lost": list(lost.items())}
    for peer, link in member.links.items():
        if peer not in lost:
            try:
                sent = result if to in (None, peer) else _NOTHING
                header = {**answer, "result": [sent.dtype.str, sent.size]}
                links.send(link, header, links.as_bytes(sent))
            except OSError:  # it ended after it arrived: the next collective says so
                continue
    return answer, result


def _report(
    member: Member, call: str, own: Any, values: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """The other ranks' side."""
    link = member.links[0]
    why = "ended"
    try:
        links.send(link, [call, own, values.dtype.str, values.size], links.as_bytes(values))
        answer = links.receive(link)
        kind, size = answer["result"]
        result = np.empty(size, kind)
        links.receive_into(link, links.as_bytes(result))
        return answer, result
    except TimeoutError:
        why = f"did not arrive within {link.gettimeout():g} s"
    except (EOFError, OSError):
        pass
    return {"lost": [[0, why]]}, _NOTHING


def _raise_lost(member: Member, call: str, lost: list[tuple[int, str]]) -> None:
    what = ", ".join(f"{member.title(peer)} {why}" for peer, why in lost)
    message = f"{call} in {member}: {what}; see the log of that rank for the cause"
    if any(why == "ended" for _, why in lost):
        raise PeerLostError(message)
    raise CollectiveTimeoutError(message)
