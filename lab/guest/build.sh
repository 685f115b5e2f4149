#!/bin/bash
# Build what the guests start from: a root file system of Debian with a node's programs, its kernel, and a small first one.
#
# usage: build.sh OUT PAUSE KUBELET KUBE_PROXY
#   OUT     a folder; root.img, vmlinuz and initrd are there in the end
#   PAUSE   an archive with the image that holds a pod's network, to be in containerd's store from the start
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
out=$1 pause=$2 kubelet=$3 kube_proxy=$4
cd "$out"
root=$out/root
packages=openssh-server,ceph-common,python3,containerd,runc,iptables,containernetworking-plugins,udev,kmod,conntrack,ethtool
packages+=,socat,iproute2,procps,e2fsprogs,busybox-static,ca-certificates
mmdebstrap --mode=root --variant=minbase --quiet --include="$packages" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$root"

# The kernel's package as files: its own hooks for an initrd are not needed.
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
mkdir kernel archives
(cd archives && apt-get -q download "$package" >/dev/null)
dpkg-deb -x archives/*.deb kernel
version=$(ls kernel/lib/modules)
rm -rf "$root/usr/lib/modules"
cp -a kernel/lib/modules "$root/usr/lib/modules"
chroot "$root" depmod "$version"
mkdir -p first/bin first/modules first/new first/dev
cp "$root/bin/busybox" first/bin/
for module in virtio_pci virtio_blk crc32c_generic ext4; do
  chroot "$root" modprobe --set-version "$version" --show-depends "$module" | while read -r verb file _; do
    [ "$verb" = insmod ] || continue
    name=${file##*/}
    grep -qx "$name" first/modules/order 2>/dev/null && continue
    cp "$root/$file" first/modules/
    echo "$name" >>first/modules/order
  done
done
cat >first/init <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
left=100
while [ ! -b /dev/vda ] && [ $left -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
mount -t ext4 -o noatime /dev/vda /new || poweroff -f
mount -o move /dev /new/dev
exec switch_root /new /sbin/guest-init
END
chmod +x first/init
(cd first && find . | cpio -o -H newc --quiet | gzip -1) >initrd
cp kernel/boot/vmlinuz-* vmlinuz

install -m 755 "$kubelet" "$root/usr/local/bin/kubelet"
install -m 755 "$kube_proxy" "$root/usr/local/bin/kube-proxy"
install -m 755 "$here/init" "$root/usr/sbin/guest-init"
rm -f "$root/etc/ssh/"ssh_host_*
: >"$root/etc/machine-id"
: >"$root/etc/resolv.conf"
printf '%s\n' 'HostKey /etc/ssh/ssh_host_ed25519_key' 'PasswordAuthentication no' 'UsePAM no' 'UseDNS no' \
  'SetEnv PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' >"$root/etc/ssh/sshd_config"

rm -rf "$root/var/lib/containerd"
printf 'version = 2\nroot = "%s"\nstate = "%s"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n address = "%s"\n' \
  "$root/var/lib/containerd" "$out/state" "$out/socket" >containerd.toml
containerd --config containerd.toml >containerd.log 2>&1 &
store=$!
trap 'kill "$store" 2>/dev/null || true' EXIT
for _ in $(seq 100); do ctr --address "$out/socket" version >/dev/null 2>&1 && break; sleep 0.1; done
ctr --address "$out/socket" --namespace k8s.io images import "$pause"
kill "$store"
wait "$store" || true
truncate --size 4G root.img
mkfs.ext4 -q -F -m 0 -d "$root" root.img
rm -rf "$root" kernel archives first state socket* containerd.toml containerd.log
