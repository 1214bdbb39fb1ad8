//! Ranks as MPI processes: each test starts this binary again under `mpirun`. Without `mpirun`
//! nothing is tested here, and the tests say so.
#![cfg(unix)]

#[path = "comm_suite/scenario.rs"]
mod scenario;
#[path = "comm_suite/mod.rs"]
mod suite;

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use moe_runner::comm::{Options, mpi};

const SCENARIO: &str = "COMM_MPI_TEST_SCENARIO";

/// Not a test: what a process under `mpirun` does.
#[test]
#[ignore = "started by the other tests, under mpirun"]
fn process() {
    let scenario = std::env::var(SCENARIO).expect("started by another test");
    // Long where nothing should wait for it.
    let waits = ["sleeps", "killed"].contains(&&*scenario);
    let timeout = Duration::from_secs(if waits { 1 } else { 600 });
    let comm = mpi::open_with(Options { timeout }, None).expect("MPI");
    let result = scenario::run(&*comm, &scenario);
    drop(comm);
    if let Err(error) = result {
        // One write, so that lines of several ranks do not mix.
        let line = format!("\nERROR {error}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        std::process::exit(1);
    }
}

/// What `ranks` processes print, and whether all ended well. `None` without `mpirun`.
fn mpirun(ranks: usize, scenario: &str) -> Option<(String, bool)> {
    let version = Command::new("mpirun").arg("--version").output();
    let Ok(version) = version else {
        eprintln!("SKIPPED: there is no mpirun (Debian: apt-get install openmpi-bin)");
        return None;
    };
    let mut command = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        // Recovery: mpirun does not end the others when one is killed; they have to do it.
        command.args(["--allow-run-as-root", "--oversubscribe", "--enable-recovery"]);
    }
    let output = command
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "process", "--ignored", "--nocapture", "--quiet"])
        .env(SCENARIO, scenario)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    Some((text.concat(), output.status.success()))
}

#[test]
fn every_collective_equals_a_sequential_computation() {
    for ranks in [1, 2, 3] {
        let Some((text, success)) = mpirun(ranks, "suite") else { return };
        assert!(success, "{text}");
        assert!(text.contains(&format!("{ranks} ranks, ")), "{text}");
        assert!(text.contains(" passed, 0 failed"), "{text}");
    }
}

#[test]
fn groups_come_and_go() {
    let Some((text, success)) = mpirun(3, "splits") else { return };
    assert!(success && text.contains("all groups left"), "{text}");
}

/// The errors of the processes that a scenario leaves, which must contain all of `words`.
fn assert_errors(scenario: &str, count: usize, words: &[&str]) {
    let Some((text, _)) = mpirun(3, scenario) else { return };
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("ERROR ")).collect();
    assert_eq!(errors.len(), count, "{text}");
    for word in words {
        assert!(errors.iter().all(|line| line.contains(word)), "no '{word}' in: {text}");
    }
}

#[test]
fn a_killed_process_is_named_by_all_others() {
    let words =
        ["waited 1 s", "rank 1, last seen", "model.layers.7.mlp", "'dispatch'", "'combine'"];
    assert_errors("killed", 2, &words);
}

#[test]
fn a_process_that_never_arrives_is_named_by_all_others() {
    let words =
        ["waited 1 s", "rank 1, last seen", "model.layers.7.mlp", "'dispatch'", "'combine'"];
    assert_errors("sleeps", 3, &words);
}

#[test]
fn a_process_that_leaves_is_named_at_once() {
    assert_errors("returns", 2, &["rank 1, last seen", "'dispatch'", "left", "'combine'"]);
    assert_errors("panics", 2, &["rank 1, last seen", "'dispatch'", "panicked"]);
}

#[test]
fn failures_are_told_to_all() {
    assert_errors("aborts", 3, &["rank 1, last seen", "gave up: out of memory"]);
    assert_errors("differs", 3, &["different collectives", "barrier", "all-reduce"]);
}

#[test]
fn calls_from_another_thread_are_refused() {
    assert_errors("other thread", 3, &["only from the thread that opened it"]);
}
