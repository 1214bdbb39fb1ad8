//! What interrupted runs left behind: found by its name, told apart from what a run is writing now
//! by a lock that ends with its process, and removed.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The file in a folder in the making that its process holds locked.
const MARKER: &str = ".moe-runner-quantize.lock";

/// Something that an earlier, interrupted run left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is, or was.
    pub path: PathBuf,
    /// Whether it was removed: only what is known to be such a run's is.
    pub removed: bool,
}

/// A folder in the making. Dropped, it is removed.
pub(super) struct Making {
    folder: TempDir,
    /// Held locked for as long as this lives.
    marker: File,
}

impl Making {
    /// Makes a folder in `parent` whose name begins with `prefix`.
    pub(super) fn begin(parent: &Path, prefix: &str) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        loop {
            let folder = builder.tempdir_in(parent)?;
            let path = folder.path().join(MARKER);
            let marker = File::create_new(&path)?;
            // not every file system has locks: there, leftovers are named and stay
            let _ = marker.lock();
            // before it was locked, another run may have taken it for a leftover
            if path.exists() {
                return Ok(Self { folder, marker });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// From now on it is nobody's leftover: no run removes it but this one.
    pub(super) fn unmark(&self) -> io::Result<()> {
        fs::remove_file(self.path().join(MARKER))
    }

    /// It stays, whatever becomes of this process.
    pub(super) fn keep(self) -> PathBuf {
        let Self { folder, marker } = self;
        drop(marker);
        folder.keep()
    }
}

/// What folders in `parent` whose names begin with `prefix` are.
#[derive(Default)]
pub(super) struct Found {
    /// Left by earlier runs.
    pub(super) leftovers: Vec<Leftover>,
    /// Being written now.
    pub(super) in_use: Option<PathBuf>,
}

impl Found {
    /// Adds what was found elsewhere.
    pub(super) fn extend(&mut self, other: Self) {
        self.leftovers.extend(other.leftovers);
        self.in_use = self.in_use.take().or(other.in_use);
    }
}

/// Looks through `parent`, and removes what runs that are no more have left there.
pub(super) fn clean(parent: &Path, prefix: &str) -> io::Result<Found> {
    let mut found = Found::default();
    for item in fs::read_dir(parent)? {
        let item = item?;
        if !item.file_name().to_string_lossy().starts_with(prefix) || !item.file_type()?.is_dir() {
            continue;
        }
        let path = item.path();
        let removed = match File::options().write(true).open(path.join(MARKER)) {
            Err(_) => false,
            Ok(marker) => match marker.try_lock() {
                Ok(()) => fs::remove_dir_all(&path).is_ok(),
                Err(TryLockError::WouldBlock) => {
                    found.in_use = Some(path);
                    continue;
                }
                Err(TryLockError::Error(_)) => false,
            },
        };
        found.leftovers.push(Leftover { path, removed });
    }
    found.leftovers.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_written_is_not_left_over() {
        let parent = tempfile::tempdir().unwrap();
        let clean = || clean(parent.path(), ".out.partial-").unwrap();
        let making = Making::begin(parent.path(), ".out.partial-").unwrap();
        let found = clean();
        assert_eq!(found.in_use.as_deref(), Some(making.path()));
        assert!(found.leftovers.is_empty());

        // as after a kill: nobody holds it
        let path = making.keep();
        fs::write(path.join("model.safetensors"), "half").unwrap();
        let found = clean();
        assert_eq!(found.leftovers, [Leftover { path: path.clone(), removed: true }]);
        assert!(found.in_use.is_none() && !path.exists());

        // a folder of that name that nobody marked may be anybody's
        let other = parent.path().join(".out.partial-mine");
        fs::create_dir(&other).unwrap();
        assert_eq!(clean().leftovers, [Leftover { path: other.clone(), removed: false }]);
        assert!(other.exists());
    }
}
