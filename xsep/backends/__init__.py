"""How the ops are run: one class a backend, behind the interface of :mod:`xsep.backends.base`."""
