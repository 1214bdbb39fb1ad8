//! Ranks that are processes which meet at an address.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::{case, refused};

/// A port that is free now.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn processes_that_meet_at_an_address_write_what_one_writes() {
    let (folder, case) = (TempDir::new().unwrap(), case("mixtral_bf16"));
    let start = |output: &Path, flags: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_moe-runner"))
            .args(["run".as_ref(), case.as_os_str()])
            .args(["--layers", "0", "--dtype", "f32", "--input-name", "layers.0.t7.x", "--input"])
            .arg(case.join("golden.safetensors"))
            .arg("--output")
            .arg(output)
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let [one, many, other] =
        ["one", "many", "other"].map(|name| folder.path().join(format!("{name}.safetensors")));
    assert!(start(&one, &[]).wait().unwrap().success());
    let address = free_address();
    let flags = ["--comm", "tcp", "--dp", "2", "--ep", "--rendezvous", &address, "--world", "2"];
    let of = |rank| [&flags[..], &["--rank", rank]].concat();
    let processes = [start(&many, &of("0")), start(&other, &of("1"))];
    for process in processes {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&many).unwrap());
    assert!(!other.exists(), "one process writes");

    // told different things, neither waits
    let address = free_address();
    let flags = ["--comm", "tcp", "--rendezvous", &address, "--rank"];
    let processes = [
        start(&many, &[&flags[..], &["0", "--dp", "2", "--ep"]].concat()),
        start(&other, &[&flags[..], &["1", "--tp", "2"]].concat()),
    ];
    for process in processes {
        let output = process.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{stderr}");
        assert!(stderr.contains("ranks 0 and 1 were started with different flags"), "{stderr}");
    }
}

#[test]
fn what_is_missing_for_a_meeting_is_told() {
    let case = case("mixtral_bf16");
    let told = |flags: &[&str]| {
        let args = ["run".as_ref(), case.as_os_str(), "--layers".as_ref(), "0".as_ref()];
        let files = ["--input", "x.safetensors", "--output", "y.safetensors"].map(OsStr::new);
        let flags = flags.iter().map(OsStr::new);
        let args: Vec<&OsStr> = args.into_iter().chain(files).chain(flags).collect();
        refused(2, args)
    };
    assert!(told(&["--comm", "tcp", "--dp", "2"]).contains("needs --rendezvous HOST:PORT"));
    let meet = ["--rendezvous", "127.0.0.1:1", "--rank", "0"];
    let with = |flags: &[&'static str]| told(&[&meet[..], flags].concat());
    assert!(with(&["--dp", "2"]).contains("is for --comm tcp"));
    assert!(with(&["--comm", "tcp", "--dp", "2", "--world", "3"]).contains("are 2 ranks"));
    let stderr =
        told(&["--comm", "tcp", "--rendezvous", "127.0.0.1:1", "--rank", "2", "--dp", "2"]);
    assert!(stderr.contains("--rank 2: there are 2 ranks"), "{stderr}");
}
