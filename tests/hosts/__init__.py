"""Two real hosts, driven over ssh: ``make vagrant-test``. Not part of ``make test``."""
