"""Equations over groups, samples and bodies: every row is there, once, and agrees with its neighbours."""

# ruff: noqa: S608 -- queries are put together from words of this package only
from __future__ import annotations

import msgspec
import xxhash

from asyncrl.buffer.audit_view import Check, Finding, View
from asyncrl.buffer.segments import Location, Segments
from asyncrl.buffer.store import BODIES
from asyncrl.errors import StorageError
from asyncrl.messages.sample import Score, Segment

SOUND_GROUP = """
case when reason is null and batch < 0 then state in ('fresh', 'open', 'ready')
     when reason is null then state = 'batched' and lane = 'train'
     else reason = state and settled_seq >= 0 and (reason = 'trained') = (batch >= 0)
          and case lane when 'eval' then reason in ('evaluated', 'failed', 'unneeded')
                        when 'train' then reason in ('trained', 'filtered', 'stale', 'surplus', 'failed',
                                                     'unneeded')
              end
end is true
"""
SOUND_SAMPLE = """
case when g.state in ('fresh', 'open')
     then s.state in ('fresh', 'generating', 'generated', 'scoring', 'scored')
     when g.state = 'ready' then s.state = 'scored'
     else s.state = g.state
end is true
"""
FINISHED = "g.state in ('ready', 'batched', 'trained', 'filtered', 'evaluated')"


def ordinals(table: str, column: str, *, first: int, noun: str) -> Check:
    """The check that a table's ordinals have no gap; `noun` is one row of it."""

    def find(view: View) -> Finding:
        count, low, high = view.rows(f"select count(*), min({column}), max({column}) from {table}")[0]
        if not count:
            return Finding(0, 0)
        missing = first
        if low == first:
            missing = view.one(
                f"select min({column}) + 1 from {table} a where {column} < ? and not exists"
                f" (select 1 from {table} b where b.{column} = a.{column} + 1)",
                high,
            )
        expected = high - first + 1
        return Finding(count, expected, "" if count == expected else f"{noun} {missing} is missing")

    return Check(f"{table}.ordinals", f"{table} are numbered from {first} without a gap", find)


def _groups(view: View) -> Finding:
    return view.counted(
        "select count(*) from groups",
        f"select group_id, lane, state, coalesce(reason, 'none'), batch, settled_seq from groups"
        f" where not ({SOUND_GROUP}) order by group_id",
        "group {0} of lane {1}: state {2}, settled as {3}, batch {4}, settled at event {5} do not go"
        " together",
    )


def _samples(view: View) -> Finding:
    expected = view.one("select coalesce(sum(num_samples), 0) from groups")
    bad = view.rows(
        "select g.group_id, g.num_samples, count(s.idx) from groups g left join samples s using (group_id)"
        " group by 1 having count(s.idx) <> g.num_samples"
        " or (count(s.idx) > 0 and (min(s.idx) <> 0 or max(s.idx) <> g.num_samples - 1)) order by 1"
    )
    words = "group {0} has {2} samples numbered from 0, the row says {1}".format(*bad[0]) if bad else ""
    if not words:
        orphans = view.rows(
            "select group_id, idx from samples where group_id not in (select group_id from groups)"
        )
        words = "sample {1} belongs to group {0}, which does not exist".format(*orphans[0]) if orphans else ""
    return Finding(view.one("select count(*) from samples"), expected, words)


def _sample_states(view: View) -> Finding:
    return view.counted(
        "select count(*) from samples",
        "select s.group_id, s.idx, s.state, g.state from samples s join groups g using (group_id)"
        f" where not ({SOUND_SAMPLE}) order by 1, 2",
        "group {0} sample {1} is {2}, its group is {3}",
    )


def _scores(view: View) -> Finding:
    return view.counted(
        "select count(*) from samples",
        "select s.group_id, s.idx, s.status, coalesce(s.reward, 'none'), s.score_body from samples s"
        f" join groups g using (group_id) left join bodies b on b.body = s.score_body"
        f" where (s.score_body <> 0 and (b.kind is not 'score' or b.group_id <> s.group_id or b.idx <>"
        f" s.idx))"
        f" or ({FINISHED} and (s.score_body = 0 or s.status not in ('completed', 'truncated')))"
        f" or (s.score_body <> 0) <> (s.reward is not null) order by 1, 2",
        "group {0} sample {1}: status {2}, reward {3} and score body {4} do not go together",
    )


def _tokens(view: View) -> Finding:
    bad = view.rows(
        "select s.group_id, s.idx, s.tokens, coalesce(sum(b.num_tokens), 0) from samples s left join bodies b"
        " on b.group_id = s.group_id and b.idx = s.idx and b.kind = 'segment' and b.dropped = 0"
        " group by 1, 2 having s.tokens <> coalesce(sum(b.num_tokens), 0) order by 1, 2"
    )
    words = "group {0} sample {1}: bodies hold {3} tokens, the row says {2}".format(*bad[0]) if bad else ""
    held = view.one("select coalesce(sum(num_tokens), 0) from bodies where kind = 'segment' and dropped = 0")
    return Finding(view.one("select coalesce(sum(tokens), 0) from samples"), held, words)


def _spans(view: View) -> Finding:
    rows = view.rows("select coalesce(sum(num_tokens), 0) from bodies where kind = 'segment'")
    total, broken = 0, ""
    for row in view.segments:
        held = sum(span.num_tokens for span in row.spans or [])
        total += held
        sound = row.spans is not None and held == row.num_tokens and all(s.num_tokens > 0 for s in row.spans)
        if not sound and not broken:
            broken = f"{row.where}: spans hold {held} tokens, the row says {row.num_tokens}"
    return Finding(int(rows[0][0]), total, broken)


def _bounds(view: View) -> Finding:
    """samples.oldest and .newest against the spans that are not dropped."""
    seen: dict[tuple[int, int], list[int]] = {}
    for row in view.segments:
        if not row.dropped:
            seen.setdefault((row.group_id, row.idx), []).extend(span.version for span in row.spans or [])
    rows = view.rows("select group_id, idx, oldest, newest from samples order by 1, 2")
    broken = [
        f"group {group} sample {index}: its row says versions {oldest} to {newest}, its spans {low} to {high}"
        for group, index, oldest, newest in rows
        for low, high in [_extremes(seen.get((group, index)))]
        if (oldest, newest) != (low, high)
    ]
    return Finding(len(rows), len(rows) - len(broken), broken[0] if broken else "")


def _extremes(values: list[int] | None) -> tuple[int | None, int | None]:
    return (min(values), max(values)) if values else (None, None)


def _prompts(view: View) -> Finding:
    return view.counted(
        "select count(*) from groups",
        "select g.group_id, g.prompt_body, g.prompt_tokens from groups g left join bodies b on b.body ="
        " g.prompt_body"
        " where b.kind is not 'prompt' or b.group_id <> g.group_id or b.idx <> -1 or b.num_tokens <>"
        " g.prompt_tokens"
        " or b.fence <> 0 or b.dropped order by 1",
        "group {0}: body {1} is not its prompt of {2} tokens",
    )


def _retries(view: View) -> Finding:
    """A group that tries another one again has its prompt, and came after that one had failed."""
    if not view.one("select count(*) from sqlite_master where name = 'retries'"):
        return Finding(0, 0, skipped="the run is older than retries")
    return view.counted(
        "select count(*) from retries",
        "select r.group_id, r.retry_of from retries r left join groups n on n.group_id = r.group_id"
        " left join groups o on o.group_id = r.retry_of left join bodies a on a.body = n.prompt_body"
        " left join bodies b on b.body = o.prompt_body where not ((o.reason = 'failed' and n.lane = 'train'"
        " and o.lane = 'train' and o.settled_at <= n.created_at and a.digest = b.digest) is true) order by 1",
        "group {0} tries group {1} again, which had not failed, or has another prompt",
    )


def _body_kinds(view: View) -> Finding:
    return view.counted(
        "select count(*) from bodies",
        "select b.body, b.kind, b.group_id, b.idx from bodies b left join groups g using (group_id)"
        " left join samples s on s.group_id = b.group_id and s.idx = b.idx where not (case b.kind"
        " when 'prompt' then g.prompt_body = b.body when 'score' then s.score_body = b.body"
        " when 'segment' then s.idx is not null else 0 end is true) order by 1",
        "body {0} ({1} of group {2} sample {3}) is named by nothing",
    )


def _places(view: View) -> Finding:
    """Bodies lie in their files, one after the other."""
    segments = Segments(view.run_dir / BODIES, writable=False)
    pruned = view.plan is not None and view.plan.topology.buffer.keep != "all"
    sizes: dict[int, int] = {}
    rows = view.rows("select body, file, offset, length from bodies order by file, offset, body")
    broken: list[str] = []
    end, last = 0, None
    for body, file, offset, length in rows:
        if file not in sizes:
            path = segments.path(file)
            sizes[file] = path.stat().st_size if path.exists() else -1
        end = 0 if file != last else end
        if sizes[file] < 0 and not pruned:
            broken.append(f"body {body}: {segments.path(file).name} is missing")
        elif sizes[file] >= 0 and offset + length > sizes[file]:
            name = segments.path(file).name
            broken.append(f"body {body} ends at byte {offset + length} of {name}, which has {sizes[file]}")
        elif offset < end or length < 0:
            broken.append(f"body {body} begins at byte {offset} of file {file}, inside the one before it")
        end, last = offset + length, file
    return Finding(len(rows), len(rows) - len(broken), broken[0] if broken else "")


def _contents(view: View) -> Finding:
    """Bodies hold what their rows say: digest, tokens, spans, reward."""
    if not view.deep:
        return Finding(0, 0, skipped="the bodies were not read")
    segments = Segments(view.run_dir / BODIES, writable=False)
    broken, count = "", 0
    sound = 0
    for row in view.db.execute(
        "select b.body, b.kind, b.num_tokens, b.file, b.offset, b.length, b.digest, s.reward from bodies b"
        " left join samples s on s.group_id = b.group_id and s.idx = b.idx order by b.body"
    ):
        count += 1
        problem = _content(segments, *row)
        sound += not problem
        broken = broken or problem
    segments.close()
    return Finding(count, sound, broken)


def _content(
    segments: Segments,
    body: int,
    kind: str,
    num_tokens: int,
    file: int,
    offset: int,
    length: int,
    digest: str,
    reward: float | None,
) -> str:
    try:
        data = segments.read(Location(file, offset, length))
        actual = xxhash.xxh3_128_hexdigest(data)
        if actual != digest:
            return f"body {body} in {segments.path(file).name} has digest {actual}, recorded was {digest}"
        if kind == "segment":
            held = msgspec.msgpack.decode(data, type=Segment).num_tokens
            return f"body {body} holds {held} tokens, the row says {num_tokens}" if held != num_tokens else ""
        if kind == "score":
            given = msgspec.msgpack.decode(data, type=Score).reward
            return f"body {body} holds reward {given}, the row says {reward}" if given != reward else ""
    except (StorageError, msgspec.DecodeError, TypeError, ValueError) as error:
        return f"body {body}: {error}"
    return ""


CHECKS = (
    ordinals("groups", "group_id", first=0, noun="group"),
    Check("groups.settled", "every group is in flight or settled once, and its state says so", _groups),
    Check("groups.samples", "every group has its samples, numbered from 0", _samples),
    Check("groups.prompt", "every group has its prompt's body", _prompts),
    Check("groups.retries", "a group that was tried again had failed, with the same prompt", _retries),
    Check("samples.state", "a sample's state is one its group's state allows", _sample_states),
    Check("samples.score", "a finished sample has one score, an unfinished one none", _scores),
    Check("samples.tokens", "a sample's tokens are those of its bodies", _tokens),
    Check("samples.versions", "a sample's oldest and newest version are those of its spans", _bounds),
    ordinals("bodies", "body", first=1, noun="body"),
    Check("bodies.owner", "every body is the prompt, a segment or the score of something", _body_kinds),
    Check("bodies.spans", "a segment's spans add up to its tokens", _spans),
    Check("bodies.place", "every body lies whole in its file, beside the others", _places),
    Check("bodies.content", "every body has its digest and holds what its row says", _contents),
)
