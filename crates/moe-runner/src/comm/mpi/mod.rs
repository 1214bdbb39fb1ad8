//! Ranks that are processes, on one machine or many, over MPI.
//!
//! `mpirun -n 4 PROGRAM` starts the processes; [`open`] joins them. libmpi is opened at run time:
//! Open MPI 4 and 5, MPICH, or any library with the MPI-5 standard interface; nothing is needed at
//! build time. Elements travel as bytes; sums are made here, in rank order, so that they equal those
//! of ranks that are threads bit by bit.
//!
//! **One thread.** All calls must come from the thread that called [`open`]; others get an error.
//! (MPI is initialised as "funneled", which every library supports at full speed.) Other threads
//! may compute meanwhile. The last handle must be dropped on that thread too, before it ends: that
//! says good-bye to the others, waits for theirs (no longer than the time-out), and finalizes MPI.
//!
//! **Failure.** As for [every group](super): a rank that fails tells the others why; one that is
//! killed or stuck is named by the others after the time-out. Note that `mpirun` by itself ends all
//! processes as soon as one is killed or exits without finalizing, which may be before they have
//! said why; Open MPI's `mpirun --enable-recovery` leaves that to them.

mod library;
mod member;
mod transfer;
mod world;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use self::member::Member;
use self::world::World;
use super::{Communicator, Options};
use crate::{Error, Result};

/// Joins the processes that this one was started with, as their group of ranks. Once per process; a
/// try that failed may be followed by another, with another library.
///
/// Errors if no library is found, or if the launcher says that there are several processes and the
/// library that was found sees one (a launcher of one MPI and a library of another).
pub fn open() -> Result<Arc<dyn Communicator>> {
    open_with(Options::default(), None)
}

/// [`open`] with options, and with the MPI library at `library` instead of the one that is found.
pub fn open_with(options: Options, library: Option<&Path>) -> Result<Arc<dyn Communicator>> {
    static OPENED: Mutex<bool> = Mutex::new(false);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if *opened {
        let reason = "MPI has been opened before in this process; hand that group on instead";
        return Err(Error::Communication(reason.to_owned()));
    }
    let (world, circle) = World::open(options, library)?;
    *opened = true;
    Ok(Arc::new(Member::new(world, circle)))
}

/// What launchers say about the number of processes.
const LAUNCHED: [&str; 4] =
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

fn check_launch(
    version: &str,
    size: usize,
    launched: impl Fn(&str) -> Option<usize>,
) -> Result<()> {
    let claims = LAUNCHED.iter().find_map(|name| Some((name, launched(name)?)));
    match claims {
        Some((name, ranks)) if ranks > 1 && size == 1 => Err(Error::Communication(format!(
            "the launcher started {ranks} processes ({name}), but {version} sees only this one: \
             each would do all the work. Use the mpirun that belongs to {version}, or give the \
             library that belongs to the mpirun"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{At, Step};

    /// One test: MPI can be opened once in a process.
    #[test]
    fn a_failed_open_may_be_tried_again_and_communicators_are_freed() {
        for _ in 0..2 {
            let nowhere = Path::new("/nonexistent/libmpi.so");
            let error = open_with(Options::default(), Some(nowhere)).err().unwrap().to_string();
            assert!(error.contains("no MPI library found"), "{error}");
        }
        let world = match World::open(Options::default(), None) {
            Ok((world, circle)) => Member::new(world, circle),
            Err(error) if error.to_string().contains("no MPI library found") => {
                return eprintln!("SKIPPED: there is no MPI (Debian: apt-get install openmpi-bin)");
            }
            Err(error) => panic!("{error}"),
        };
        let live = || world.seat.world.engine().circles.len();
        for _ in 0..100 {
            let part = world.split(0, 0).unwrap();
            part.barrier(At::new("test", Step::Finish)).unwrap();
            assert_eq!(live(), 2);
            drop(part);
            assert_eq!(live(), 1);
        }
    }

    #[test]
    fn a_world_of_one_under_a_launcher_of_many_is_refused() {
        let launched = |name: &str| (name == "PMI_SIZE").then_some(4);
        let error = check_launch("Open MPI v5", 1, launched).unwrap_err().to_string();
        assert!(
            error.contains("4 processes (PMI_SIZE)") && error.contains("Open MPI v5"),
            "{error}"
        );
        assert!(check_launch("Open MPI v5", 4, launched).is_ok());
        assert!(check_launch("Open MPI v5", 1, |_| None).is_ok());
        assert!(check_launch("Open MPI v5", 1, |_| Some(1)).is_ok());
    }
}
