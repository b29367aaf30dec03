#!/bin/sh
# On each host, as root: the package, huge pages, and root's ssh key for the tests.
# usage: install.sh HUGEPAGES          /tmp/payload.tar.gz was made by vagrant/payload on the host
set -eu

home=/opt/postcopy
rm -rf "$home"
mkdir -p "$home"
tar -xzf /tmp/payload.tar.gz -C "$home"
rm /tmp/payload.tar.gz

# The wheels are unpacked already, for one Python: pip takes minutes on an emulated machine.
wanted=$(cat "$home/python")
found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') || found=none
if [ "$found" != "$wanted" ]; then
	echo "install.sh: Python here is $found, the package was built for $wanted;" \
		"take a box with that one (POSTCOPY_BOX)" >&2
	exit 1
fi
python="env PYTHONPATH=$home/site python3"
printf '#!/bin/sh\nexec %s -m migration "$@"\n' "$python" >/usr/local/bin/postcopy
printf '#!/bin/sh\ncd %s/validation && exec %s scripts/validate-kernel "$@"\n' "$home" "$python" \
	>/usr/local/bin/validate-kernel
chmod 755 /usr/local/bin/postcopy /usr/local/bin/validate-kernel

echo "vm.nr_hugepages = $1" >/etc/sysctl.d/90-postcopy.conf
sysctl -q -w "vm.nr_hugepages=$1"

# The tests do what root does on a host: guests on huge pages, links, qdiscs.
install -d -m 700 /root/.ssh
cp /home/vagrant/.ssh/authorized_keys /root/.ssh/authorized_keys
