"""A method of one object that also tells others of its calls, and leaves no trace when nobody listens."""

from __future__ import annotations

import weakref


class Watched:
    """A method in whose place an object carries this, as long as somebody listens.

    A listener is called after the method with its result and its arguments; what it returns, if anything, is
    what the caller gets.
    """

    def __init__(self, owner, method: str):
        self.owner, self.method = weakref.ref(owner), method
        self.own = vars(owner).get(method)  # somebody had put another method on this object already
        self.listeners: list = []

    @property
    def __wrapped__(self):  # pipelines inspect the signature
        if self.own is not None:
            return self.own
        return getattr(type(self.owner()), self.method).__get__(self.owner())

    def __call__(self, *args, **kwargs):
        result = self.__wrapped__(*args, **kwargs)
        for tell in self.listeners:
            changed = tell(result, *args, **kwargs)
            result = result if changed is None else changed
        return result

    def __reduce__(self):
        # Copying and pickling reach the owner first, so this is the plain method of the owner's copy.
        return getattr, (self.owner(), self.method)

    @staticmethod
    def on(owner, method: str, tell) -> None:
        if not isinstance(vars(owner).get(method), Watched):
            vars(owner)[method] = Watched(owner, method)
        vars(owner)[method].listeners.append(tell)

    @staticmethod
    def off(owner, method: str, tell) -> None:
        watched = vars(owner).get(method)
        if isinstance(watched, Watched) and tell in watched.listeners:
            watched.listeners.remove(tell)
            if not watched.listeners and watched.own is not None:
                vars(owner)[method] = watched.own
            elif not watched.listeners:
                del vars(owner)[method]
