"""tmp"""

from tools.chaos.spec import Case
from asyncrl.chaos import Order


def matrix():
    return [
        Case(name="none", role="none"),
        Case(
            name="generator kill mid",
            role="generator",
            orders=[
                Order(actor="generator-0", at="sent:Reports", where={"status": "pending"}, action="kill")
            ],
        ),
        Case(
            name="trainer kill",
            role="trainer",
            orders=[Order(actor="trainer", at="sent:Trained", nth=2, action="kill")],
        ),
        Case(
            name="supervisor kill",
            role="supervisor",
            orders=[Order(actor="supervisor", at="receive:Telemetry", nth=30, action="kill")],
        ),
    ]


def expand(seed, n):
    return matrix()[:n]
