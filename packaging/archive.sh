#!/usr/bin/env bash
# Puts a built binary, its completions and manual pages and the licences into dist/fewbit-VERSION-NAME.tar.gz (.zip on
# Windows), with its SHA-256 beside it: packaging/archive.sh FOLDER_OF_THE_BINARY NAME
set -euo pipefail
folder=$1 name=$2
root=$(cd "$(dirname "$0")/.." && pwd)
program="$folder/fewbit"
if [ -f "$program.exe" ]; then program="$program.exe"; fi
version=$("$program" --version | sed -n '1s/^fewbit \([^;]*\);.*/\1/p')
package="fewbit-$version-$name"
mkdir -p dist
rm -rf "dist/$package"
mkdir -p "dist/$package/completions"
cp "$program" "$root/README.md" "$root/CHANGELOG.md" "$root/LICENSE-MIT" "$root/LICENSE-APACHE" "dist/$package/"
# The built-in model and texts have licences of their own.
cp "$root/datasets/README.md" "dist/$package/LICENSES-of-built-in-data.md"
for shell in bash elvish fish powershell zsh; do
  "$program" completions "$shell" >"dist/$package/completions/fewbit.$shell"
done
"$program" man "dist/$package/man" >/dev/null
cd dist
case "$program" in
*.exe)
  archive="$package.zip"
  7z a -bso0 "$archive" "$package"
  ;;
*)
  archive="$package.tar.gz"
  tar -czf "$archive" "$package"
  ;;
esac
rm -rf "$package"
if command -v sha256sum >/dev/null; then
  sha256sum "$archive" >"$archive.sha256"
else
  shasum -a 256 "$archive" >"$archive.sha256"
fi
