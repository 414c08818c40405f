#!/bin/sh
# What boot.py runs in the guest: inside.sh KERNEL RELEASE CGROUP ROOT REPOSITORY COMMAND...
# Makes the root described there, and runs the command in it. KERNEL is the folder in which the kernel is unpacked; ROOT
# is "overlay" or, where the disk has the files already, "copy".
set -eu
kernel=$1 release=$2 cgroup=$3 root=$4 repository=$5
shift 5

mkdir /run/machine /run/disk /run/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 machine /run/machine
mount /dev/vda /run/disk
mkdir -p /run/disk/temporary
if [ "$root" = copy ]; then
  mount --bind /run/disk /run/root
  for folder in proc sys dev run tmp root usr/src lib/modules; do mkdir -p "/run/root/$folder"; done
else
  mkdir /run/disk/upper /run/disk/work
  mount -t overlay -o lowerdir=/run/machine,upperdir=/run/disk/upper,workdir=/run/disk/work root /run/root
fi

if [ "$cgroup" = 1 ]; then
  umount /sys/fs/cgroup
  mount -t tmpfs cgroup /sys/fs/cgroup
  mkdir /sys/fs/cgroup/memory
  mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
fi

for folder in proc sys dev run; do mount --rbind /$folder /run/root/$folder; done
mkdir -p /run/root/temporary
mount --bind /run/disk/temporary /run/root/temporary
# Modules and headers are where an installed package has them, beside the headers that the machine has. (/run/machine is
# there in both roots.)
mount --bind "/run/machine$kernel/lib/modules" /run/root/lib/modules
for folder in "/run/machine$kernel/usr/src"/* /run/machine/usr/src/*; do
  name=$(basename "$folder")
  test -e "/run/root/usr/src/$name" || ln -s "$folder" /run/root/usr/src/
done
test "$(uname -r)" = "$release"

# Newer kernels (7.3) have khugepaged read the whole of 2 MiB of a mapped file of which some pages are there: not into counts.
echo 3600000 > /sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs || true

export TMPDIR=/temporary HOME="${HOME:-/root}" PATH="$repository/.venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=1 LLMTRACED_KERNEL=1 LLMTRACED_E2E=1 LLMTRACED_EMULATED=1
# Here a clock may be set and the machine suspended.
if [ "$root" = copy ]; then export LLMTRACED_GUEST=1; fi
export NPY_DISABLE_CPU_FEATURES=X86_V3 # its sorting by AVX2 crashes where QEMU 7.2 emulates that
if [ "$root" = overlay ]; then exec chroot /run/root sh -c 'cd "$0" && exec "$@"' "$repository" "$@"; fi
chroot /run/root sh -c 'cd "$0" && exec "$@"' "$repository" "$@" && code=0 || code=$?
# Who started this may not find its own files any more: it is done here, without any.
echo "$code" > /dev/virtio-ports/virtme.ret
echo b > /proc/sysrq-trigger # switching off asks each device, and some do not answer after that sleep
while :; do :; done
