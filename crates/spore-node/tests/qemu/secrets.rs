//! When an app's secrets are in its guest: before the network is open, and for the app alone.

use spore_node::hypervisor::fork::Afterwards;
use spore_wire::guest::{AppSecrets, Exec, Readiness, Reply, Request, StartApp};
use spore_wire::secret::SecretBytes;

use crate::agent::shell;
use crate::fork::{boot_only, capture, fork_only};
use crate::host::TestHost;
use crate::thaw::{some, until};

/// Says what it knows, each time that it is started.
const APP: &str = "echo \"$KEY and $(cat /run/secrets/TOKEN)\"; exec sleep 1000";

const KNOWN: &str = "key-4711 and token-4712";

fn secrets(key: &str) -> AppSecrets {
    let named = |name: &str, value: &str| {
        let value = SecretBytes::new(value.as_bytes().to_vec());
        vec![(name.to_owned(), value)]
    };
    AppSecrets {
        environment: named("KEY", key),
        files: named("TOKEN", "token-4712"),
    }
}

/// What a script prints as the user that an app runs as.
fn as_the_default_user(script: &str) -> Request {
    Request::Exec(Exec {
        user: None,
        ..shell(script)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_in_place_before_the_network_and_for_the_app_alone() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = boot_only(&driver, &machine).await;
    let given = source.agent.thaw_giving(source.vm, secrets("key-4711"));
    let Ok(Reply::Thawed(thawed)) = given.await else {
        unreachable!("the secrets were not taken");
    };
    println!("the steps and their microseconds: {:?}", thawed.done);
    let there = source.agent.sh("cat /run/secrets/TOKEN; echo; env").await;
    assert!(there.starts_with("token-4712\n"), "{there}");
    assert!(!there.contains("key-4711"), "{there}");
    let script = "cat /run/secrets/TOKEN 2>&1; ls /run/secrets 2>&1; mv /run/secrets /run/a 2>&1";
    let stream = source.agent.open(as_the_default_user(script)).await;
    let (_exit, denied) = source.agent.finish(stream).await.unwrap();
    assert!(!denied.contains("4712"), "{denied}");
    assert_eq!(denied.matches("ermission denied").count(), 3, "{denied}");

    source.held.open_network().await.unwrap();
    let start = Request::StartApp(StartApp {
        command: ["/bin/sh", "-c", APP].map(str::to_owned).to_vec(),
        directory: "/".to_owned(),
        environment: vec![("KEY".to_owned(), "no secret".to_owned())],
        secret_environment: None,
        secret_files: None,
        user: None,
        port: 8000,
        ready: Readiness::Port,
        ready_timeout_ms: 60_000,
    });
    assert_eq!(source.agent.ask(start).await, Ok(Reply::Done));
    until(async || some(source.agent.logged().await, KNOWN)).await;

    let taken = capture(&mut source, Afterwards::GoesOn, None).await;
    let mut same = fork_only(&driver, &machine, &taken.source, source.vm).await;
    let given = same.agent.thaw_giving(same.vm, secrets("key-4711"));
    given.await.unwrap();
    let mut other = fork_only(&driver, &machine, &taken.source, source.vm).await;
    let given = other.agent.thaw_giving(other.vm, secrets("key-4713"));
    let refused = given.await.unwrap_err();
    assert!(refused.message.contains("other secrets"), "{refused:?}");
    assert!(!refused.message.contains("471"), "{refused:?}");
    let mut kept = fork_only(&driver, &machine, &taken.source, source.vm).await;
    kept.agent.thaw(kept.vm, "kept").await.unwrap();
    for fork in [&mut same, &mut kept] {
        let file = fork.agent.sh("cat /run/secrets/TOKEN").await;
        assert_eq!(file, "token-4712");
        // It is started again, and knows what it knew.
        assert_eq!(fork.agent.logged().await, "");
        fork.agent.sh("kill -9 $(pidof sleep)").await;
        until(async || some(fork.agent.logged().await, KNOWN)).await;
    }
    for vm in [source.vm, same.vm, other.vm, kept.vm] {
        driver.release(vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}
