"""The program that `make demo` runs: a shop's order book, kept in plain Python objects.

It knows nothing of farmem; any Python runs it.  A few hundred MiB of dictionaries, lists and
strings are loaded, indexed, sorted and looked up, and each step prints a line that depends on all
that it went through.  The same lines must come out wherever the memory is.
"""

from __future__ import annotations

import hashlib
import random

ORDERS = 420_000
CUSTOMERS = 60_000
LOOKUPS = 150_000
RECENT = 40_000

Order = dict[str, object]


def load(dice: random.Random) -> dict[int, Order]:
    """All orders, each an object of several hundred bytes."""
    return {
        number: {
            "number": number,
            "customer": f"customer-{dice.randrange(CUSTOMERS):06d}",
            "article": f"article-{dice.getrandbits(32):08x}",
            "cents": dice.randrange(100, 1_000_000),
            "note": f"deliver to door {dice.getrandbits(64):016x}",
        }
        for number in range(ORDERS)
    }


def index(orders: dict[int, Order]) -> dict[object, list[int]]:
    """The numbers of each customer's orders."""
    found: dict[object, list[int]] = {}
    for number, order in orders.items():
        found.setdefault(order["customer"], []).append(number)
    return found


def say(step: str, what: str) -> None:
    print(f"{step}: {hashlib.sha256(what.encode()).hexdigest()[:24]}", flush=True)


def main() -> None:
    """Load, index, report, and serve a busy hour."""
    dice = random.Random(2024)
    orders = load(dice)
    say("loaded", str(orders[ORDERS // 2]))
    by_customer = index(orders)
    say("indexed", str(sorted(len(numbers) for numbers in by_customer.values())))
    best = sorted(orders.values(), key=lambda order: (order["cents"], order["number"]))
    say("sorted", "".join(f"{order['note']}" for order in best[::7]))
    # Let go of while the orders are still held: to free them in this order, at the end of the
    # program, would be the most scattered access of all, and tell nothing.
    del best
    totals = hashlib.sha256()
    for _ in range(LOOKUPS):
        # Nine of ten ask for a recent order, as people do.
        low = ORDERS - RECENT if dice.random() < 0.9 else 0
        order = orders[dice.randrange(low, ORDERS)]
        totals.update(f"{order['number']} {order['note']}".encode())
    say("looked up", totals.hexdigest())
    total = hashlib.sha256()
    for number, order in orders.items():
        total.update(f"{number} {order['article']} {order['cents']} {order['note']}".encode())
    say("all orders", total.hexdigest())


if __name__ == "__main__":
    main()
