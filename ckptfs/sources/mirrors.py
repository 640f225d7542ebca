"""Several hosts that have the same images: who is asked next, and when all of them have failed.

The hosts of a reference in order, mirrors before the registry itself (places.py). An operation goes through a
`Rotation`: a host that fails is left for the next one at once, and is passed over by later operations for a while
(standing.py); only when nobody is left to ask does it wait, as retry.py says, until its deadline. Each host has its own
endpoint, with its own credentials and its own territory: nothing of one is ever shown to another. Used by registry.py
and blobs.py.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from ckptfs.errors import AuthError, CkptfsError, IntegrityError, NotFoundError, UnavailableError
from ckptfs.sources.auth import PULL, Authorizer
from ckptfs.sources.credentials import Credentials, find_credentials
from ckptfs.sources.endpoint import Endpoint
from ckptfs.sources.origin import Origin, Territory
from ckptfs.sources.places import Place
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import NoTLS, Transport

log = logging.getLogger(__name__)

T = TypeVar("T")

_NO_RANGES_FOR = 60.0  # seconds in which a host that serves whole blobs only is not asked for ranges again
_ONE_RANGE_FOR = 300.0  # the same for several ranges at once: finding out costs a connection


class Host:
    """One place, and what has been learnt of it. Threads share it."""

    def __init__(
        self,
        place: Place,
        transport: Transport,
        credentials: Credentials | None = None,
        actions: frozenset[str] = PULL,
    ) -> None:
        """`credentials` in place of what the user's auth files say of this host. `actions`: what they are used for."""
        self.place = place
        self._transport = transport
        self._credentials = credentials
        self._actions = actions
        self._no_ranges_until = self._one_range_until = float("-inf")
        self._endpoint = self._open(place.scheme or "https")

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    @property
    def netloc(self) -> str:
        """What standing and host windows know it by."""
        return self._endpoint.origin.netloc

    def ask(self, question: Callable[[Endpoint], T]) -> T:
        """What `question` returns. An insecure host that turns out to speak no TLS is asked over HTTP from then on."""
        try:
            return question(self._endpoint)
        except NoTLS:
            if self.place.scheme:
                raise
            log.warning("%s is insecure and speaks no TLS: going on with plain HTTP", self.place.host)
            self._endpoint = self._open("http")
            return question(self._endpoint)

    def has_ranges(self, now: float) -> bool:
        return now >= self._no_ranges_until

    def without_ranges(self, now: float) -> None:
        """It sends whole blobs in place of ranges; for a minute that is taken for how it is."""
        self._no_ranges_until = now + _NO_RANGES_FOR

    def has_many_ranges(self, now: float) -> bool:
        """Whether it may be asked for several ranges with one request."""
        return now >= self._one_range_until

    def without_many_ranges(self, now: float) -> None:
        """It did not answer that well; for five minutes it is asked for one range at a time."""
        self._one_range_until = now + _ONE_RANGE_FOR

    def _open(self, scheme: str) -> Endpoint:
        place, transport = self.place, self._transport
        territory = Territory(Origin.of(f"{scheme}://{place.address}"))
        transport.trust(territory.home, place.trust)

        def find() -> Credentials | None:
            return self._credentials or find_credentials(place.host, place.repository)

        authorizer = Authorizer(transport, territory, f"{place.host}/{place.repository}", find, self._actions)
        return Endpoint(
            transport, territory, authorizer, place.host, place.repository, root=place.root, namespace=place.namespace
        )


class Route:
    """One host in one operation. `error`: why it is not asked any more."""

    __slots__ = ("attempts", "error", "host", "ready_at")

    def __init__(self, host: Host, attempts: Attempts) -> None:
        self.host = host
        self.attempts = attempts
        self.ready_at = float("-inf")
        self.error: CkptfsError | None = None


class Rotation:
    """The patience of one operation over its hosts.

    seconds      how long it may go without progress, whoever is asked.
    outlast      as in Attempts, for each of the hosts.
    last_resort  asked only when all others have failed for good.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        transport: Transport,
        seconds: float,
        *,
        outlast: bool = False,
        last_resort: Host | None = None,
    ) -> None:
        self._transport = transport
        self._last_resort = last_resort
        self._routes = [Route(host, transport.attempts(seconds, outlast=outlast)) for host in hosts]

    def choose(self) -> Route:
        """The host to ask now: of those that may be asked the first that is well. Sleeps where there is none."""
        now = self._transport.clock.now()
        live = [route for route in self._routes if route.error is None]
        live = [route for route in live if route.host is not self._last_resort] or live
        ready = [route for route in live if self._opens(route) <= now]
        if ready:
            return min(ready, key=lambda route: self._transport.standing.avoided(route.host.netloc, now))
        first = min(live, key=self._opens)
        if first.ready_at > now:
            self._transport.clock.sleep(first.ready_at - now)
        return first

    def alternatives(self, route: Route) -> bool:
        """Whether another host could be asked instead."""
        return any(other.error is None for other in self._routes if other is not route)

    def progress(self, count: int) -> None:
        """`count` useful bytes came: the patience with all of them may start anew."""
        for route in self._routes:
            route.attempts.progress(count)

    def worked(self, route: Route) -> None:
        self._transport.standing.worked(route.host.netloc)

    def failed(self, route: Route, error: CkptfsError) -> None:
        """Return when there is another try to be made, here or elsewhere; raise when there is none."""
        clock, counters = self._transport.clock, self._transport.counters
        wait = route.attempts.pause(error)
        self._judge(route.host.netloc, error)
        if wait is None:
            route.error = error
            home = self._routes[-1].error  # what the registry itself says counts for more than its mirrors
            if all(other.error is not None for other in self._routes):
                counters.failed()
                log.info("%s; nobody is left to ask", error.message)
                raise home or error
            if home is not None:
                for other in self._routes:
                    other.attempts.outlast = False  # nobody waits a minute for a mirror when the registry has answered
        else:
            route.ready_at = clock.now() + wait
        log.info("%s; trying again %s", error.message, "elsewhere" if wait is None else f"in {wait:.2f} s")
        counters.retried(error.message)

    def _opens(self, route: Route) -> float:
        return max(route.ready_at, self._transport.windows.opens(route.host.netloc))

    def _judge(self, netloc: str, error: CkptfsError) -> None:
        standing, now = self._transport.standing, self._transport.clock.now()
        if isinstance(error, IntegrityError | AuthError):
            standing.lied(netloc, now)
        elif not isinstance(error, NotFoundError | StillFilling):
            standing.failed(netloc, now)


class StillFilling(UnavailableError):
    """A mirror that has no ranges of a blob yet; says nothing against it."""


def ask(hosts: Sequence[Host], transport: Transport, question: Callable[[Endpoint, Attempts], T], seconds: float) -> T:
    """What `question` returns for the first host that has an answer; the last host's error where none has."""

    def put(route: Route) -> T:
        return route.host.ask(lambda endpoint: question(endpoint, route.attempts))

    rotation = Rotation(hosts, transport, seconds)
    while True:
        route = rotation.choose()
        try:
            found = put(route)
        except CkptfsError as error:
            rotation.failed(route, error)
        else:
            rotation.worked(route)
            return found
