"""Equations over leases and members: whoever handed something in had the right to."""

# ruff: noqa: S608 -- queries are put together from words of this package only
from __future__ import annotations

from asyncrl.buffer.audit_rows import ordinals
from asyncrl.buffer.audit_view import Check, Finding, View

HAS_INDEX = "instr(',' || l.indices || ',', ',' || {0} || ',') > 0"


def _results(view: View) -> Finding:
    """The fence of every segment and score names a lease on that sample, given to that worker."""
    return view.counted(
        "select count(*) from bodies where kind <> 'prompt'",
        "select b.body, b.kind, b.group_id, b.idx, b.fence, b.worker from bodies b left join leases l using"
        " (fence)"
        " where b.kind <> 'prompt' and not ((l.kind = case b.kind when 'segment' then 'generate' else"
        " 'score' end"
        f" and l.group_id = b.group_id and l.worker = b.worker and {HAS_INDEX.format('b.idx')}) is true)"
        f" order by 1",
        "body {0} ({1} of group {2} sample {3}): lease {4} did not give that sample to {5}",
    )


def _workers(view: View) -> Finding:
    """samples.worker is who handed in the newest segment."""
    return view.counted(
        "select count(*) from samples",
        "select s.group_id, s.idx, s.worker, coalesce(b.worker, '') from samples s left join"
        " (select group_id, idx, max(body) newest, worker from bodies where kind = 'segment' group by 1, 2) b"
        " on b.group_id = s.group_id and b.idx = s.idx where s.worker <> coalesce(b.worker, '') order by 1,"
        " 2",
        "group {0} sample {1}: its row names {2!r}, its newest segment is by {3!r}",
    )


def _sample_leases(view: View) -> Finding:
    """A sample's newest lease is one on it, and it is open exactly while somebody works on the sample."""
    return view.counted(
        "select count(*) from samples",
        "select s.group_id, s.idx, s.state, s.fence from samples s left join leases l on l.fence = s.fence"
        f" where (s.fence <> 0 and not ((l.group_id = s.group_id and {HAS_INDEX.format('s.idx')}) is true))"
        " or (s.state in ('generating', 'scoring') and not ((l.ended_at is null"
        " and l.kind = case s.state when 'generating' then 'generate' else 'score' end) is true)) order by"
        " 1, 2",
        "group {0} sample {1} is {2} under lease {3}, which is not an open lease on it",
    )


def _leases(view: View) -> Finding:
    """A lease is on a group that exists, under its version, to somebody who was a member."""
    return view.counted(
        "select count(*) from leases",
        "select l.fence, l.kind, l.worker, l.group_id, l.version from leases l left join groups g using"
        " (group_id)"
        " left join members m on m.name = l.worker and m.incarnation = l.incarnation"
        " where not ((g.version = l.version and m.name is not null and l.kind in ('generate', 'score',"
        " 'filter')"
        " and (l.ended_at is null) = (l.outcome is null)) is true) order by 1",
        "lease {0} ({1}) to {2} on group {3} under version {4}: no such member, group or version of it",
    )


def _open_leases(view: View) -> Finding:
    """A lease has ended, or its worker is still a member and its group in flight."""
    return view.counted(
        "select count(*) from leases",
        "select l.fence, l.kind, l.worker, l.group_id from leases l left join members m on m.name = l.worker"
        " and m.incarnation = l.incarnation and m.left_at is null left join groups g on g.group_id ="
        " l.group_id"
        " and g.reason is null and g.batch < 0"
        " where l.ended_at is null and (m.name is null or g.group_id is null) order by 1",
        "lease {0} ({1}) to {2} on group {3} is open, but its worker has left or its group is done",
    )


def _filters(view: View) -> Finding:
    """A group's filter lease is one on it."""
    return view.counted(
        "select count(*) from groups where fence <> 0",
        "select g.group_id, g.fence from groups g left join leases l using (fence)"
        " where g.fence <> 0 and not ((l.group_id = g.group_id and l.kind = 'filter') is true) order by 1",
        "group {0}: lease {1} is not a filter's lease on it",
    )


def _swaps(view: View) -> Finding:
    """Whoever loaded a version was a member, and the version exists."""
    return view.counted(
        "select count(*) from swaps",
        "select w.name, w.version, w.incarnation from swaps w left join versions v using (version,"
        " incarnation)"
        " where v.version is null or w.name not in (select name from members)",
        "{0} loaded version {1}.{2}: no such member or version",
    )


def _at_the_end(view: View) -> Finding:
    """Nothing is in flight once everything is done."""
    if not view.finished:
        return Finding(0, 0, skipped="the run has not finished")
    rows = view.rows("select group_id, state from groups where reason is null order by 1")
    return Finding(len(rows), 0, "group {} is still {}".format(*rows[0]) if rows else "")


CHECKS = (
    ordinals("leases", "fence", first=1, noun="lease"),
    Check("leases.grant", "every lease was given to a member, on a group, under its version", _leases),
    Check("leases.open", "an open lease has its worker here and its group in flight", _open_leases),
    Check("leases.results", "every segment and score came under a lease on that sample", _results),
    Check(
        "leases.samples", "a sample's newest lease is one on it, open while it is worked on", _sample_leases
    ),
    Check("leases.filters", "a group's filter lease is one on it", _filters),
    Check("samples.worker", "a sample names whoever handed in its newest tokens", _workers),
    Check("swaps.known", "versions were loaded by members, and exist", _swaps),
    Check("run.end", "nothing is in flight when the run has finished", _at_the_end),
)
