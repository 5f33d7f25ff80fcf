"""Equations over batches, trainings, versions and staleness: what was trained, in order, and how old."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import msgspec

from asyncrl.buffer.audit_rows import ordinals
from asyncrl.buffer.audit_view import Check, Finding, View
from asyncrl.buffer.select import first_overdue
from asyncrl.buffer.store import batch_digest
from asyncrl.messages.version import Manifest

NO_PLAN = "there is no readable plan.json"


def _positions(view: View) -> Finding:
    """batch_groups of a batch are 0..n-1, and n is the batch's count."""
    bad = view.rows(
        "select b.batch, b.num_groups, count(p.position) from batches b left join batch_groups p using"
        " (batch)"
        " group by 1 having count(p.position) <> b.num_groups or min(p.position) <> 0"
        " or max(p.position) <> b.num_groups - 1 order by 1"
    )
    words = "batch {0} has {2} groups at positions from 0, the row says {1}".format(*bad[0]) if bad else ""
    if not words:
        stray = view.rows(
            "select batch, group_id from batch_groups where batch not in (select batch from batches)"
        )
        words = "group {1} is in batch {0}, which is not recorded".format(*stray[0]) if stray else ""
    groups = view.one("select sum(num_groups) from batches")
    return Finding(groups, view.one("select count(*) from batch_groups"), words)


def _members(view: View) -> Finding:
    """groups.batch agrees with batch_groups, and no group is in two batches."""
    listed: dict[int, list[int]] = {}
    for batch, group in view.rows("select batch, group_id from batch_groups order by batch, position"):
        listed.setdefault(group, []).append(batch)
    rows = view.rows("select group_id, batch from groups order by 1")
    wrong = [
        f"group {group}: its row says batch {batch}, batch_groups {listed.get(group, [])}"
        for group, batch in rows
        if listed.get(group, []) != ([batch] if batch >= 0 else [])
    ]
    known = {group for group, _ in rows}
    wrong += [
        f"batch {listed[group][0]} lists group {group}, which does not exist"
        for group in listed.keys() - known
    ]
    count = view.one("select count(*) from groups where batch >= 0")
    return Finding(count, sum(map(len, listed.values())), wrong[0] if wrong else "")


def _sizes(view: View) -> Finding:
    return view.counted(
        "select count(*) from batches",
        "select b.batch, b.num_samples, b.num_tokens, count(s.idx), coalesce(sum(s.tokens), 0) from batches b"
        " left join groups g using (batch) left join samples s using (group_id)"
        " group by 1 having b.num_samples <> count(s.idx) or b.num_tokens <> coalesce(sum(s.tokens), 0)"
        " order by 1",
        "batch {0}: its groups have {3} samples and {4} tokens, the row says {1} and {2}",
    )


def _digests(view: View) -> Finding:
    rows = view.rows("select batch, digest from batches order by 1")
    broken = []
    for batch, digest in rows:
        actual = batch_digest(view.db, batch)
        if actual != digest:
            broken.append(f"batch {batch} has digest {actual} over its bodies, recorded was {digest}")
    return Finding(len(rows), len(rows) - len(broken), broken[0] if broken else "")


def _order(view: View) -> Finding:
    """Batches are cut one after the other, of groups issued before, and settled after."""
    rows = view.rows(
        "select b.batch, b.seq, max(g.issued_seq), min(case when g.reason is null then b.seq + 1 else"
        " g.settled_seq end)"
        " from batches b join groups g using (batch) group by 1 order by 1"
    )
    words = [
        f"batch {batch} was cut at event {seq}; a group of it was issued at {issued} or settled at {settled}"
        for batch, seq, issued, settled in rows
        if not issued < seq < settled
    ]
    words += [f"batch {b} was cut at event {t}, batch {a} before it at {s}"
              for (a, s, *_), (b, t, *_) in pairwise(rows) if s >= t]  # fmt: skip
    return Finding(len(rows), len(rows) - len(words), words[0] if words else "")


# Trainings.


def _trained(view: View) -> Finding:
    """Every training is of a recorded batch, in a known life, with a plausible size."""
    return view.counted(
        "select count(*) from trained",
        "select t.batch, t.incarnation, t.tokens from trained t left join batches b using (batch)"
        " left join incarnations i using (incarnation) where not ((b.batch is not null and i.incarnation is"
        " not null"
        " and t.tokens between 0 and b.num_tokens and t.started <= t.ended and t.digest <> '') is true)"
        " order by 1, 2",
        "training of batch {0} in incarnation {1} ({2} tokens): no such batch or incarnation, or impossible"
        " numbers",
    )


def _steps(view: View) -> Finding:
    """Optimizer steps: num_steps_per_rollout for every batch."""
    if view.plan is None:
        return Finding(0, 0, skipped=NO_PLAN)
    each = view.plan.num_steps_per_rollout
    rows = view.rows(
        "select 'training of batch ' || batch, step, batch + 1 from trained union all"
        " select 'version ' || version, step, version from versions union all"
        " select 'checkpoint of rollout step ' || rollout_step, step, rollout_step from checkpoints"
    )
    bad = [(what, step, count * each) for what, step, count in rows if step != count * each]
    words = "{} is at optimizer step {}, not {}".format(*bad[0]) if bad else ""
    return Finding(len(rows), len(rows) - len(bad), words)


def _lives(view: View) -> Finding:
    """Each life of the trainer trains without a gap from the checkpoint it starts with."""
    lives = view.rows("select incarnation, rollout_step, checkpoint from incarnations order by 1")
    broken = []
    for incarnation, first, path in lives:
        batches = [row[0] for row in view.rows(
            "select batch from trained where incarnation = ? order by 1", incarnation
        )]  # fmt: skip
        expected = list(range(first, first + len(batches)))
        if batches != expected:
            wrong = next(b for b, e in zip(batches, expected, strict=True) if b != e)
            broken.append(
                f"incarnation {incarnation} starts at batch {first} and trained batch {wrong} out of turn"
            )
        elif not _starts_at_checkpoint(view, incarnation, first, path):
            broken.append(
                f"incarnation {incarnation} starts at rollout step {first}, where no checkpoint {path!r} is"
            )
    return Finding(len(lives), len(lives) - len(broken), broken[0] if broken else "")


def _starts_at_checkpoint(view: View, incarnation: int, first: int, path: str) -> bool:
    if not first:
        return not path
    sql = "select count(*) from checkpoints where rollout_step = ? and path = ? and incarnation < ?"
    return view.one(sql, first, path, incarnation) > 0


def _lineage(view: View) -> Finding:
    """The surviving weights hold batches 0..n-1, each once, and exactly their groups are trained."""
    batches = [row.batch for row in view.lineage]
    settled = [
        row[0] for row in view.rows("select distinct batch from groups where reason = 'trained' order by 1")
    ]
    words = ""
    if batches != list(range(len(batches))):
        found = Counter(batches)
        wrong = next(b for b in range(len(batches) + 1) if found[b] != 1)
        words = f"the surviving weights hold batch {wrong} {found[wrong]} times"
    elif batches != settled:
        wrong = min(set(batches) ^ set(settled))
        how = "trained, but its groups are not" if wrong in batches else "settled as trained, but was not"
        words = f"batch {wrong} is {how}"
    return Finding(len(batches), len(settled), words)


def _versions(view: View) -> Finding:
    """A version's digest is that of the weights after the batch before it, in its incarnation's lineage."""
    rows = view.rows("select version, incarnation, digest, manifest, num_bytes from versions order by 1, 2")
    broken = []
    for version, incarnation, digest, data, num_bytes in rows:
        manifest = msgspec.json.decode(data, type=Manifest)
        told = (manifest.version, manifest.incarnation, manifest.digest, manifest.num_bytes)
        expected = _digest_after(view, version, incarnation)
        if told != (version, incarnation, digest, num_bytes):
            broken.append(f"version {version}.{incarnation}: its row and its manifest differ")
        elif version and expected != digest:
            broken.append(
                f"version {version}.{incarnation} has digest {digest}, the weights after batch {version - 1}"
                f" had "
                f"{expected or 'none: it was not trained'}"
            )
    return Finding(len(rows), len(rows) - len(broken), broken[0] if broken else "")


def _digest_after(view: View, version: int, incarnation: int) -> str:
    rows = view.rows(
        "select digest from trained where batch = ? and incarnation <= ? order by incarnation desc limit 1",
        version - 1,
        incarnation,
    )
    return str(rows[0][0]) if rows else ""


def _named_versions(view: View) -> Finding:
    """Whatever names a version names one that was published."""
    known = set(view.rows("select version, incarnation from versions"))
    used = {(span.version, span.incarnation): row.where for row in view.segments for span in row.spans or []}
    issued = view.rows("select version, incarnation, group_id from groups where version >= 0")
    used |= {(version, incarnation): f"group {group}" for version, incarnation, group in issued}
    bad = sorted(pair for pair in used if pair not in known)
    words = f"{used[bad[0]]} names version {bad[0][0]}.{bad[0][1]}, which was never published" if bad else ""
    return Finding(len(used), len(used) - len(bad), words)


def _published(view: View) -> Finding:
    """Every version due, up to the newest, was published.

    A push is written beside the next step, so a trainer may die with one on its way; its next life then
    starts at a checkpoint less than two pushes later, and what was on its way is never published.
    """
    if view.plan is None:
        return Finding(0, 0, skipped=NO_PLAN)
    interval = view.plan.topology.rollout.update_weights_interval
    known = {row[0] for row in view.rows("select version from versions")}
    starts = [row[0] for row in view.rows("select rollout_step from incarnations")]
    due = [
        version
        for version in range(0, max(known, default=-1) + 1, interval)
        if version in known or not any(version < start < version + 2 * interval for start in starts)
    ]
    missing = [version for version in due if version not in known]
    words = f"version {missing[0]} was never published, and newer ones were" if missing else ""
    return Finding(len(due), len(due) - len(missing), words)


def _checkpoints(view: View) -> Finding:
    return view.counted(
        "select count(*) from checkpoints",
        "select c.rollout_step, c.incarnation from checkpoints c where not exists (select 1 from"
        " incarnations i"
        " where i.incarnation = c.incarnation) or (c.rollout_step > 0 and not exists (select 1 from trained t"
        " where t.batch = c.rollout_step - 1 and t.incarnation <= c.incarnation)) order by 1, 2",
        "checkpoint of rollout step {0} by incarnation {1}: no such training",
    )


# Staleness.


def _late(view: View) -> Finding:
    """No token is older than max_staleness rollout steps when it is trained."""
    if view.plan is None or view.plan.topology.rollout.on_straggler == "train":
        return Finding(
            0, 0, skipped=NO_PLAN if view.plan is None else 'on_straggler = "train" lets stragglers through'
        )
    return view.counted(
        "select count(*) from samples s join groups g using (group_id) where g.batch >= 0",
        "select s.group_id, s.idx, s.oldest, g.batch from samples s join groups g using (group_id)"
        " where g.batch >= 0 and s.oldest < g.batch - ? order by 1, 2",
        "group {0} sample {1}: its oldest token is of version {2}, and it is in batch {3}",
        view.plan.topology.rollout.max_staleness,
    )


def _due(view: View) -> Finding:
    """A group issued under version v is due in batch v + max_staleness, and is in no later one."""
    if view.plan is None:
        return Finding(0, 0, skipped=NO_PLAN)
    rollout = view.plan.topology.rollout
    return view.counted(
        "select count(*) from groups",
        "select group_id, version, due, batch from groups where not (case when lane = 'eval' or version < 0"
        " then due = -1 and batch < 0 else due = version + ? and issued_seq >= 0 and (batch <= due or ?) end"
        " is true)"
        " order by 1",
        "group {0}, issued under version {1}, is due in batch {2} and is in batch {3}",
        rollout.max_staleness,
        rollout.on_straggler == "train",
    )


def _issue_version(view: View) -> Finding:
    """No token is older than its group's issue version; an evaluation's are all of its version."""
    groups = {row[0]: row[1:] for row in view.rows("select group_id, lane, version, incarnation from groups")}
    broken = []
    for row in view.segments:
        lane, version, incarnation = groups.get(row.group_id, ("train", -1, 0))
        for span in row.spans or []:
            mixed = lane == "eval" and (span.version, span.incarnation) != (version, incarnation)
            if mixed or span.version < version:
                broken.append(f"{row.where} has tokens of version {span.version}; its group is of {version}")
                break
    return Finding(len(view.segments), len(view.segments) - len(broken), broken[0] if broken else "")


def _feasible(view: View) -> Finding:
    """After every cut, what was outstanding could still be trained by the batch it was due in."""
    if view.plan is None or view.plan.topology.rollout.on_straggler == "train":
        return Finding(
            0, 0, skipped=NO_PLAN if view.plan is None else 'on_straggler = "train" does not promise it'
        )
    size = view.plan.topology.rollout.rollout_batch_size
    cuts = view.rows("select seq, batch from batches order by batch")
    came = deque(view.rows("select issued_seq, due from groups where due >= 0 order by 1"))
    went = deque(
        view.rows(
            "select settled_seq, due from groups where due >= 0 and reason is not null and batch < 0 order"
            " by 1"
        )
    )
    taken: dict[int, list[int]] = {}
    for batch, due in view.rows("select batch, due from groups where due >= 0 and batch >= 0"):
        taken.setdefault(batch, []).append(due)
    dues: Counter[int] = Counter()
    broken = []
    for seq, batch in cuts:
        while came and came[0][0] < seq:
            dues[came.popleft()[1]] += 1
        while went and went[0][0] < seq:
            dues[went.popleft()[1]] -= 1
        dues.subtract(taken.get(batch, []))
        late = first_overdue(+dues, batch + 1, size)
        if late is not None:
            broken.append(
                f"after batch {batch} more groups were due by batch {late} than it and those before hold"
            )
    return Finding(len(cuts), len(cuts) - len(broken), broken[0] if broken else "")


def _evaluations(view: View) -> Finding:
    """An evaluation is done when all of its groups are settled; every group of the lane belongs to one.

    One that was given up, as its version was lost with the trainer, is never done; nothing of it is open.
    """
    bad = view.rows(
        "select version, incarnation from (select e.version, e.incarnation, e.done_at, e.seen, exists (select"
        " 1 from groups g where g.lane = 'eval' and g.version = e.version and g.incarnation = e.incarnation)"
        " as any, exists (select 1 from groups g where g.lane = 'eval' and g.version = e.version"
        " and g.incarnation = e.incarnation and g.reason is null) as open from evaluations e)"
        " where case when seen < 0 then open or done_at is not null"
        " else (done_at is null) <> open and (done_at is not null or any) or (seen and done_at is null) end"
    )
    words = (
        "evaluation of version {}.{}: done or seen does not agree with its groups".format(*bad[0])
        if bad
        else ""
    )
    stray = view.rows(
        "select g.group_id, g.version, g.incarnation from groups g left join evaluations e"
        " using (version, incarnation) where g.lane = 'eval' and e.version is null"
        " and (g.version >= 0 or g.reason is not 'unneeded') order by 1"
    )
    if stray and not words:
        words = "group {} belongs to an evaluation of version {}.{}, which was not started".format(*stray[0])
    count = view.one("select count(*) from groups where lane = 'eval'")
    return Finding(count, count - len(stray), words)


CHECKS = (
    ordinals("batches", "batch", first=0, noun="batch"),
    Check("batches.positions", "a batch's groups stand at positions 0..n-1", _positions),
    Check("batches.groups", "no group is in two batches, and its row names the one it is in", _members),
    Check("batches.sizes", "a batch counts its groups' samples and tokens", _sizes),
    Check("batches.digest", "a batch's digest is that of its bodies, in order", _digests),
    Check("batches.order", "batches are cut in order, of groups issued before and settled after", _order),
    ordinals("incarnations", "incarnation", first=1, noun="incarnation"),
    Check("trained.recorded", "every training is of a recorded batch", _trained),
    Check("trained.steps", "optimizer steps are num_steps_per_rollout for every batch", _steps),
    Check("trained.lives", "each life of the trainer trains without a gap from its checkpoint", _lives),
    Check(
        "trained.lineage", "the surviving weights hold every batch once, and its groups are trained", _lineage
    ),
    Check("versions.digest", "a version is the weights after the batch before it", _versions),
    Check("versions.published", "every version that was due, up to the newest, was published", _published),
    Check("versions.known", "every version that is named was published", _named_versions),
    Check("checkpoints.trained", "a checkpoint is of weights that were trained", _checkpoints),
    Check("staleness.tokens", "no trained token is older than max_staleness", _late),
    Check("staleness.due", "a group is due max_staleness after its issue, and in no later batch", _due),
    Check("staleness.issue", "no token is older than its group's issue version", _issue_version),
    Check("staleness.feasible", "every cut left room for what was outstanding", _feasible),
    Check("evaluations.groups", "an evaluation is done when its groups are", _evaluations),
)
