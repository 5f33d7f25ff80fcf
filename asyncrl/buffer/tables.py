"""The tables of `buffer.db` and the statements that write them. Anyone may open the file and read them.

Ordinals (groups, bodies, leases, batches) have no gaps, so that a missing row can be named.
"""

from __future__ import annotations

IMPORTED = "imported"
"""Key in `meta` of a run whose batches were made elsewhere; its value says where from."""

SCHEMA = """
create table if not exists meta (key text primary key, value) without rowid;
create table if not exists totals (key text primary key, value integer not null) without rowid;
create table if not exists groups (
  group_id integer primary key, lane text not null, dataset text not null, num_samples integer not null,
  state text not null, reason text, version integer not null, incarnation integer not null,
  due integer not null, batch integer not null, prompt_body integer not null, prompt_tokens integer not null,
  fence integer not null, issued_seq integer not null, settled_seq integer not null, created_at real not null,
  settled_at real not null, note text not null);
create table if not exists samples (
  group_id integer not null, idx integer not null, state text not null, status text not null,
  tokens integer not null, attempts integer not null, fence integer not null, worker text not null,
  oldest integer, newest integer, reward real, removed integer not null, score_body integer not null,
  primary key (group_id, idx)) without rowid;
create table if not exists bodies (
  body integer primary key, kind text not null, group_id integer not null, idx integer not null,
  num_tokens integer not null, spans text not null, fence integer not null, worker text not null,
  file integer not null, offset integer not null, length integer not null, digest text not null,
  dropped integer not null default 0);
create table if not exists leases (
  fence integer primary key, kind text not null, worker text not null, incarnation text not null,
  group_id integer not null, indices text not null, version integer not null, granted_at real not null,
  ended_at real, outcome text);
create table if not exists batches (
  batch integer primary key, num_groups integer not null, num_samples integer not null,
  num_tokens integer not null, digest text not null, seq integer not null, cut_at real not null);
create table if not exists batch_groups (
  batch integer not null, position integer not null, group_id integer not null,
  primary key (batch, position)) without rowid;
create table if not exists trained (
  batch integer not null, incarnation integer not null, step integer not null, digest text not null,
  started real not null, ended real not null, tokens integer not null,
  primary key (batch, incarnation)) without rowid;
create table if not exists versions (
  version integer not null, incarnation integer not null, step integer not null, digest text not null,
  num_bytes integer not null, manifest blob not null, published_at real not null,
  primary key (version, incarnation)) without rowid;
create table if not exists incarnations (
  incarnation integer primary key, process text not null, checkpoint text not null,
  rollout_step integer not null, started_at real not null);
create table if not exists checkpoints (
  rollout_step integer not null, incarnation integer not null, step integer not null, path text not null,
  saved_at real not null, primary key (rollout_step, incarnation)) without rowid;
create table if not exists evaluations (
  version integer not null, incarnation integer not null, started_at real not null, done_at real,
  seen integer not null default 0, primary key (version, incarnation)) without rowid;
create table if not exists members (
  name text not null, incarnation text not null, role text not null, host text not null, pid integer not null,
  joined_at real not null, left_at real, reason text, primary key (name, incarnation)) without rowid;
create table if not exists swaps (
  name text not null, version integer not null, incarnation integer not null, pause_s real not null,
  transfer_s real not null, aborted integer not null, recomputed_tokens integer not null, at real not null);
create index if not exists bodies_by_sample on bodies (group_id, idx);
create index if not exists groups_open on groups (state) where reason is null;
create index if not exists groups_by_batch on groups (batch) where batch >= 0;
create index if not exists groups_by_evaluation on groups (version, incarnation) where lane = 'eval';
"""

# `batch >= 0` beside `batch = ?` lets SQLite use the index of batched groups.
STATEMENTS = {
    "group": "insert or replace into groups values (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
    "sample": "insert or replace into samples values (?,?,?,?,?,?,?,?,?,?,?,?,?)",
    "body": "insert into bodies values (?,?,?,?,?,?,?,?,?,?,?,?,0)",
    "drop_bodies": "update bodies set dropped = 1 where group_id = ? and idx = ? and kind = 'segment'",
    "lease": "insert into leases values (?,?,?,?,?,?,?,?,null,null)",
    "lease_end": "update leases set ended_at = ?, outcome = ? where fence = ? and ended_at is null",
    "batch": "insert into batches values (?,?,?,?,?,?,?)",
    "batch_group": "insert into batch_groups values (?,?,?)",
    "trained": "insert or replace into trained values (?,?,?,?,?,?,?)",
    "trained_groups": "update groups set state = 'trained', reason = 'trained', settled_at = ?,"
    " settled_seq = ? where batch = ? and batch >= 0",
    "trained_samples": "update samples set state = 'trained'"
    " where group_id in (select group_id from batch_groups where batch = ?)",
    "untrain_groups": "update groups set state = 'batched', reason = null, settled_seq = -1"
    " where batch >= ? and batch >= 0 and reason = 'trained'",
    "untrain_samples": "update samples set state = 'batched'"
    " where group_id in (select group_id from batch_groups where batch >= ?)",
    "version": "insert or replace into versions values (?,?,?,?,?,?,?)",
    "incarnation": "insert into incarnations values (?,?,?,?,?)",
    "checkpoint": "insert or replace into checkpoints values (?,?,?,?,?)",
    "evaluation": "insert or replace into evaluations values (?,?,?,null,0)",
    "evaluation_done": "update evaluations set done_at = ? where version = ? and incarnation = ?",
    "evaluation_seen": "update evaluations set seen = 1 where version = ? and incarnation = ?",
    "evaluation_gone": "update evaluations set seen = -1 where version = ? and incarnation = ?",
    "member": "insert into members values (?,?,?,?,?,?,null,null)"
    " on conflict (name, incarnation) do update set left_at = null, reason = null",
    "everyone_left": "update members set left_at = ?, reason = ? where left_at is null",
    "member_left": "update members set left_at = ?, reason = ? where name = ? and incarnation = ?"
    " and left_at is null",
    "swap": "insert into swaps values (?,?,?,?,?,?,?,?)",
    "meta": "insert or replace into meta values (?,?)",
    "total": "insert or replace into totals values (?,?)",
}
