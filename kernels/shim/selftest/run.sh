#!/bin/sh
# Builds and runs the shim's own test: run.sh [plain|tsan|asan]...   (all three by default)
set -eu
cd "$(dirname "$0")/.."
out=${TMPDIR:-/tmp}/railhop-shim-selftest
failed=0
for flavour in ${*:-plain tsan asan}; do
    case $flavour in
        plain) flags= ;;
        tsan) flags=-fsanitize=thread ;;
        asan) flags=-fsanitize=address,undefined ;;
        *) echo "no such flavour: $flavour" >&2; exit 2 ;;
    esac
    mkdir -p "$out/$flavour"
    printf '#include "%s"\n' "$PWD/selftest/selftest.cu" > "$out/$flavour/kernels.hpp"
    ls ./*.cpp selftest/selftest.cpp | xargs -P 2 -I SOURCE sh -c '
        g++ -std=c++20 -O2 -g -ffp-contract=off -march=x86-64-v3 -Wall -Wextra '"$flags"' \
            -DRAILHOP_KERNELS="\"'"$out/$flavour"'/kernels.hpp\"" -c SOURCE -o '"$out/$flavour"'/$(basename SOURCE).o'
    g++ $flags "$out/$flavour"/*.o -o "$out/$flavour/selftest"
    echo "$flavour:"
    TSAN_OPTIONS="exitcode=66 ${TSAN_OPTIONS:-}" "$out/$flavour/selftest" || failed=1
done
exit $failed
