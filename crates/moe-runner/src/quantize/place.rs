//! Files and folders that get their names without taking them from others.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Renames `from` to `to`, where nothing may be.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if something is there.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // not every kernel and file system can do it in one step
            Err(Errno::NOSYS | Errno::INVAL | Errno::NOTSUP) => {}
            done => return Ok(done?),
        }
    }
    rename_new_in_steps(from, to)
}

/// The same with what every system has. What appears between two steps is not replaced either:
/// a rename never puts a folder in the place of files, and a second name never takes one that is
/// given. Only a file on a file system without second names (FAT) may replace another in that
/// moment.
fn rename_new_in_steps(from: &Path, to: &Path) -> io::Result<()> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    if from.is_dir() {
        return fs::rename(from, to);
    }
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        Err(_) => fs::rename(from, to),
    }
}

/// Renames that can be taken back.
#[derive(Default)]
pub(super) struct Moves {
    done: Vec<(PathBuf, PathBuf)>,
}

impl Moves {
    /// Renames `from` to `to`, where nothing may be.
    ///
    /// # Errors
    /// As [`rename_new`]; the moves before stay.
    pub(super) fn rename(&mut self, from: PathBuf, to: PathBuf) -> io::Result<()> {
        rename_new(&from, &to)?;
        self.done.push((from, to));
        Ok(())
    }

    /// Takes everything back, the last first. Returns whether all is where it was.
    pub(super) fn undo(self) -> bool {
        self.done
            .into_iter()
            .rev()
            .fold(true, |all, (from, to)| rename_new(&to, &from).is_ok() && all)
    }
}

/// Bytes that may still be written to the file system of `folder`, where the system tells.
pub(super) fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In one step and in several: what is there stays there.
    #[test]
    fn nothing_is_replaced() {
        for rename in [rename_new, rename_new_in_steps] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            fs::write(path("a"), "a").unwrap();
            fs::write(path("b"), "b").unwrap();
            fs::create_dir(path("c")).unwrap();
            fs::create_dir(path("empty")).unwrap();
            for (from, to) in [("a", "b"), ("a", "empty"), ("c", "b"), ("c", "empty")] {
                let error = rename(&path(from), &path(to)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{from} to {to}");
            }
            assert_eq!(fs::read(path("b")).unwrap(), b"b");
            rename(&path("a"), &path("new")).unwrap();
            rename(&path("c"), &path("new folder")).unwrap();
            assert_eq!(fs::read(path("new")).unwrap(), b"a");
            assert!(!path("a").exists() && !path("c").exists() && path("new folder").is_dir());
        }
    }

    #[test]
    fn moves_are_taken_back_as_far_as_nothing_is_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), "a").unwrap();
        fs::write(path("b"), "b").unwrap();
        let moved = || {
            let mut moves = Moves::default();
            moves.rename(path("a"), path("a2")).unwrap();
            moves.rename(path("b"), path("b2")).unwrap();
            moves
        };
        assert!(moved().undo());
        assert_eq!(fs::read(path("a")).unwrap(), b"a");
        let moves = moved();
        fs::write(path("a"), "another").unwrap();
        assert!(!moves.undo());
        assert_eq!(fs::read(path("a")).unwrap(), b"another");
        assert_eq!(fs::read(path("a2")).unwrap(), b"a", "kept");
        assert_eq!(fs::read(path("b")).unwrap(), b"b", "the others are back");
    }
}
