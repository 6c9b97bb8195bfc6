#!/usr/bin/env bash
# Fetch the questions of BANKING77 from where they are published, at one commit; what is no such file is refused and not kept.
#
#   tools/banking77.sh FOLDER       FROM=an address with train.csv and test.csv, for a mirror
#
# The digests are those of the files that the example's figures were measured on.
set -euo pipefail
folder=${1:?banking77: name a folder}
commit=57ec275d8078af65b7731c2a98be812d844a6d6b
from=${FROM:-https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/$commit/banking_data}

mkdir -p "$folder"
cd "$folder"
trap 'rm -f .train.csv .test.csv' EXIT
while read -r digest name; do
    ! echo "$digest  $name" | sha256sum --check --status 2>/dev/null || continue # it is here
    curl --fail --silent --show-error --location --retry 3 --max-time 120 --output ".$name" "$from/$name" ||
        { echo "banking77: cannot fetch $from/$name" >&2; exit 1; }
    echo "$digest  .$name" | sha256sum --check --status ||
        { echo "banking77: $from/$name is another file: its SHA-256 is not $digest" >&2; exit 1; }
    mv ".$name" "$name"
done <<'END'
b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b train.csv
d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d test.csv
END
