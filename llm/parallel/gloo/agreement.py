"""Before a collective, all ranks of a group tell each other what they are about to do.

Gloo hangs for 30 seconds, or adds up unrelated memory, when ranks call different collectives. Here
rank 0 of the group collects one short line from each rank and sends all of them back, which also
finds ranks that are late or dead, and names them. Costs one round trip between two processes.
"""

from typing import TYPE_CHECKING, Any

from llm.parallel.gloo import links
from llm.parallel.gloo.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
)

if TYPE_CHECKING:
    from llm.parallel.gloo.members import Member

_PURPOSE = "agreement"
_MARGIN_S = 5.0  # others wait longer than rank 0, whose message says more


def open_links(member: "Member") -> None:
    """Connect the ranks of a new group to its rank 0."""
    from llm.parallel.gloo import members

    if member.rank == 0:
        for peer in range(1, member.size):
            key = (member.name, _PURPOSE, peer)
            link = members.listener().take(key, members.timeout_s())
            link.settimeout(members.timeout_s())
            member.arrivals[peer] = link
    else:
        key = (member.name, _PURPOSE, member.rank)
        link = links.connect(member.peers[0], key)
        link.settimeout(members.timeout_s() + _MARGIN_S)
        member.arrivals[0] = link


def agree(member: "Member", operation: str, detail: str = "", own: Any = None) -> list[Any]:
    """Wait until all ranks are at the same collective; return each rank's ``own``.

    Args:
        member: this process in the group.
        operation: which collective.
        detail: what else has to be the same on all ranks, such as the data type and size.
        own: JSON-able, may differ between ranks.

    Raises:
        CollectiveMismatchError: ranks called different collectives.
        CollectiveTimeoutError: a rank did not arrive in time.
        PeerLostError: a rank ended.
    """
    call = f"{operation} {detail}".strip()
    answer = _collect(member, call, own) if member.rank == 0 else _report(member, call, own)
    if answer["lost"]:
        _raise_lost(member, call, answer)
    rows = answer["rows"]
    if any(row[0] != rows[0][0] for row in rows):
        called = "; ".join(f"{member.title(rank)}: {row[0]}" for rank, row in enumerate(rows))
        raise CollectiveMismatchError(
            f"the ranks of {member} called different collectives: {called}"
        )
    return [row[1] for row in rows]


def _collect(member: "Member", call: str, own: Any) -> dict[str, Any]:
    rows: list[Any] = [[call, own]]
    lost: dict[int, str] = {}
    for peer, link in member.arrivals.items():
        try:
            rows.append(links.receive(link))
        except TimeoutError:
            lost[peer] = f"did not arrive within {link.gettimeout():g} s"
        except EOFError:
            lost[peer] = "ended"
        if peer in lost:
            rows.append(None)
    # JSON has no integer keys.
    answer = {"rows": rows, "lost": list(lost.items())}
    for peer, link in member.arrivals.items():
        if peer not in lost:
            try:
                links.send(link, answer)
            except OSError:  # it ended after it arrived: the next collective says so
                continue
    return answer


def _report(member: "Member", call: str, own: Any) -> dict[str, Any]:
    link = member.arrivals[0]
    why = "ended"
    try:
        links.send(link, [call, own])
        answer: dict[str, Any] = links.receive(link)
        return answer
    except TimeoutError:
        why = f"did not arrive within {link.gettimeout():g} s"
    except (EOFError, OSError):
        pass
    return {"rows": [], "lost": [[0, why]]}


def _raise_lost(member: "Member", call: str, answer: dict[str, Any]) -> None:
    lost = answer["lost"]
    what = ", ".join(f"{member.title(peer)} {why}" for peer, why in lost)
    message = f"{call} in {member}: {what}; see the log of that rank for the cause"
    if any(why == "ended" for _, why in lost):
        raise PeerLostError(message)
    raise CollectiveTimeoutError(message)
