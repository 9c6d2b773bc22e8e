//! Compiled kernels on disk, so that only the first process of a machine compiles them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

/// FNV-1a with 128 bits: the same in every build, which the standard library's hashes don't promise.
pub(super) struct Hash(u128);

impl Hash {
    pub(super) fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Takes in a text and its length, so that no two lists of texts look the same.
    pub(super) fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes()).bytes(&(text.len() as u64).to_le_bytes())
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        let mix = |hash: u128, &byte: &u8| (hash ^ u128::from(byte)).wrapping_mul((1 << 88) + 0x13b);
        Self(bytes.iter().fold(self.0, mix))
    }

    pub(super) fn value(&self) -> u128 {
        self.0
    }
}

/// Where the cache is: `RAILHOP_CACHE`, else `railhop` in `XDG_CACHE_HOME` or in `~/.cache`.
pub(super) fn folder() -> Option<PathBuf> {
    choose(|name| env::var_os(name).filter(|value| !value.is_empty()))
}

fn choose(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(own) = variable("RAILHOP_CACHE") {
        return Some(own.into());
    }
    // By its specification a relative one is none.
    let shared = variable("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let shared = shared.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    Some(shared?.join("railhop"))
}

/// What is kept in `folder` under `name`; what `make` makes, and kept from now on, where that is nothing or damaged.
pub(super) fn fetch<E>(
    folder: Option<&Path>,
    name: &str,
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let path = folder.map(|folder| folder.join(name));
    if let Some(kept) = path.as_deref().and_then(read) {
        return Ok(kept);
    }
    let made = make()?;
    if let Some(path) = path
        && let Err(error) = write(&path, &made)
    {
        // The next process compiles again, no more.
        tracing::debug!(path = %path.display(), %error, "compiled kernels can't be kept");
    }
    Ok(made)
}

/// Bytes behind an entry's content: its hash. The driver is not told how long an image is, so it must be whole.
const SEAL: usize = size_of::<u128>();

fn seal(content: &[u8]) -> [u8; SEAL] {
    Hash::new().bytes(content).value().to_le_bytes()
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut content = fs::read(path).ok()?;
    let at = content.len().checked_sub(SEAL).filter(|&at| at > 0)?;
    let found = content.split_off(at);
    (found == seal(&content)).then_some(content)
}

/// Written aside and renamed: whoever looks meanwhile sees the entry whole, or not at all.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Threads of one process compile one after the other.
    let aside = path.with_extension(process::id().to_string());
    let written =
        fs::write(&aside, [content, &seal(content)].concat()).and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_fnv_1a() {
        assert_eq!(Hash::new().bytes(b"a").value(), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
        let split = Hash::new().text("a").text("bc");
        assert_ne!(split.value(), Hash::new().text("ab").text("c").value());
    }

    #[test]
    fn an_entry_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        // Not there yet.
        let folder = folder.path().join("railhop");
        let made = fetch(Some(&folder), "sm_90a", || Ok::<_, ()>(b"cubin".to_vec()));
        assert_eq!(made, Ok(b"cubin".to_vec()));
        assert_eq!(fetch(Some(&folder), "sm_90a", || Err(())), Ok(b"cubin".to_vec()));
        assert_eq!(fetch(Some(&folder), "sm_100a", || Err(())), Err(()));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_entry_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("entry");
        let make = |content: &[u8]| fetch(Some(folder.path()), "entry", || Ok::<_, ()>(content.to_vec()));
        make(b"first").unwrap();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[0] ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() - 1], &whole[..3], &[]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(make(b"second"), Ok(b"second".to_vec()));
            assert_eq!(make(b"third"), Ok(b"second".to_vec()));
        }
    }

    #[test]
    fn what_can_not_be_kept_is_made_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "in the way").unwrap();
        for folder in [None, Some(file.as_path())] {
            assert_eq!(fetch(folder, "entry", || Ok::<_, ()>(vec![1])), Ok(vec![1]));
        }
        assert_eq!(fetch(Some(folder.path()), "entry", || Err("does not compile")), Err("does not compile"));
    }

    #[test]
    fn the_folder_is_the_nearest_that_is_named() {
        let of = |known: &'static [(&str, &str)]| {
            choose(|name| known.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
        };
        assert_eq!(of(&[("RAILHOP_CACHE", "/r"), ("HOME", "/h")]), Some("/r".into()));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), Some("/x/railhop".into()));
        assert_eq!(of(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]), Some("/h/.cache/railhop".into()));
        assert_eq!(of(&[]), None);
    }
}
