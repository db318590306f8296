//! Snapshots and sandboxes, as a client calls them.
#![expect(
    clippy::too_many_lines,
    reason = "a story or a table of calls reads better whole"
)]

use core::time::Duration;

use serde_json::{Value, json};
use spore_wire::id::SnapshotId;
use spore_wire::node::VmFailureKind;
use tower::ServiceExt as _;

use crate::api::tests::{Answer, Bench, YOUR_TOKEN, request, with};
use crate::fake::{Act, MoodyStore};
use crate::nodes::NodesError;
use crate::store::record::encode;
use crate::store::record::sandbox::SANDBOXES;
use crate::store::record::snapshot_key::SNAPSHOT_KEYS;
use crate::store::record::tag::{TAGS, TagRecord, tag_key};
use crate::store::{Transaction, every};

impl Bench {
    /// An app, and a checkpoint of it.
    async fn with_tag(tag: &str) -> Self {
        let bench = Self::new().await;
        bench.deploy("notes", |_| {}).await;
        bench.checkpoint("apps/notes", tag).await;
        bench
    }

    async fn checkpoint(&self, of: &str, tag: &str) -> Value {
        let path = format!("/api/v1/{of}/checkpoint");
        self.ok("POST", &path, Some(json!({"tag": tag}))).await
    }

    async fn fork(&self, from: &str, count: u32) -> Vec<Value> {
        let body = json!({"from": from, "count": count});
        let forks = self.ok("POST", "/api/v1/forks", Some(body)).await;
        forks.as_array().unwrap().clone()
    }

    async fn ids(&self, from: &str, count: u32) -> Vec<String> {
        let forks = self.fork(from, count).await;
        let id = |fork: &Value| {
            assert!(fork.get("error").is_none(), "{fork}");
            fork["id"].as_str().unwrap().to_owned()
        };
        forks.iter().map(id).collect()
    }

    async fn refused(&self, path: &str, body: Value) -> (String, String) {
        let answer = self.call("POST", path, Some(body)).await;
        (answer.code(), answer.json()["message"].to_string())
    }

    async fn items(&self, path: &str) -> Vec<Value> {
        let page = self.ok("GET", path, None).await;
        page["items"].as_array().unwrap().clone()
    }

    async fn records(&self, prefix: &str) -> usize {
        every(&*self.store, prefix).await.unwrap().len()
    }

    /// VMs of sandboxes.
    fn sandbox_vms(&self) -> usize {
        let running = self.nodes.running();
        running.iter().filter(|(_, release)| *release == 0).count()
    }

    fn snapshots(&self) -> Vec<SnapshotId> {
        self.nodes.state.lock().unwrap().snapshots.ids()
    }

    /// Waits until nothing of any sandbox is left.
    async fn until_nothing(&self) {
        for _wait in 0..600 {
            if self.sandbox_vms() == 0 && self.records(SANDBOXES).await == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{} VMs are left", self.sandbox_vms());
    }
}

fn yours(method: &str, path: &str, body: Option<Value>) -> http::Request<axum::body::Body> {
    let token = format!("Bearer {YOUR_TOKEN}");
    with(request(method, path, body), "authorization", &token)
}

fn found(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.code())
}

fn keyed(path: &str, key: &str, body: &Value) -> http::Request<axum::body::Body> {
    let create = request("POST", path, Some(body.clone()));
    with(create, "idempotency-key", key)
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_and_a_fork_with_a_key_are_made_once() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let take = json!({"tag": "first"});
    let path = "/api/v1/apps/notes/checkpoint";
    let first = bench.send(keyed(path, "take", &take)).await;
    let again = bench.send(keyed(path, "take", &take)).await;
    assert_eq!(first.status, 200, "{}", first.json());
    assert_eq!(first.json(), again.json(), "pauses included");
    let taken = bench.call("POST", path, Some(take.clone())).await;
    assert_eq!(
        taken.code(),
        "conflict",
        "without its key it is another call"
    );

    let order = json!({"from": "first", "count": 3});
    let fork = || bench.send(keyed("/api/v1/forks", "fork", &order));
    let [first, again] = [fork().await.json(), fork().await.json()];
    assert_eq!((first.as_array().unwrap().len(), &first), (3, &again));
    assert_eq!(bench.sandbox_vms(), 3);
    let gone = first[0]["id"].as_str().unwrap().to_owned();
    let path = format!("/api/v1/sandboxes/{gone}");
    bench.ok("DELETE", &path, None).await;
    let later = fork().await.json();
    assert_eq!(later[0]["error"]["code"], "not_found", "{later}");
    assert_eq!(later[1], first[1]);
    assert_eq!(bench.sandbox_vms(), 2);

    let of = format!(
        "/api/v1/sandboxes/{}/checkpoint",
        first[1]["id"].as_str().unwrap()
    );
    let take = json!({"tag": "second"});
    let deeper = bench.send(keyed(&of, "deeper", &take)).await.json();
    assert_eq!(bench.send(keyed(&of, "deeper", &take)).await.json(), deeper);
    let other = json!({"from": "first", "count": 1});
    let refused = bench.send(keyed("/api/v1/forks", "fork", &other)).await;
    assert_eq!(found(&refused), (409, "idempotency_mismatch".to_owned()));
    bench.ok("DELETE", "/api/v1/snapshots/second", None).await;
    let refused = bench.send(keyed(&of, "deeper", &take)).await;
    assert_eq!(found(&refused), (404, "not_found".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_repetition_waits_for_the_first_call_and_makes_anew_what_failed() {
    let bench = Bench::with_tag("first").await;
    let order = json!({"from": "first", "count": 2, "all_or_nothing": true});
    let fork = || bench.send(keyed("/api/v1/forks", "fork", &order));
    let (one, other) = tokio::join!(fork(), fork());
    let [first, second] = match one.status.is_success() {
        true => [one, other],
        false => [other, one],
    };
    assert_eq!(first.status, 200, "{}", first.json());
    assert_eq!(found(&second), (429, "too_many_requests".to_owned()));
    let [one, other] = [fork().await.json(), fork().await.json()];
    assert_eq!((one.as_array().unwrap().len(), &one), (2, &other));
    assert_eq!(bench.sandbox_vms(), 2);

    for sandbox in one.as_array().unwrap() {
        let path = format!("/api/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
        bench.ok("DELETE", &path, None).await;
    }
    let anew = fork().await.json();
    assert_ne!(anew, other);
    assert_eq!(bench.sandbox_vms(), 2);

    let order = json!({"from": "no-such", "count": 1});
    let refused = bench.send(keyed("/api/v1/forks", "late", &order)).await;
    assert_eq!(found(&refused), (404, "not_found".to_owned()));
    bench.checkpoint("apps/notes", "no-such").await;
    let made = bench.send(keyed("/api/v1/forks", "late", &order)).await;
    assert_eq!(made.status, 200, "{}", made.json());
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_is_forked_used_rolled_back_and_thrown_away() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    bench.ok("POST", "/api/v1/apps/notes/stop", None).await;
    let taken = bench.checkpoint("apps/notes", "first").await;
    assert_eq!(
        (&taken["pause_ms"], &taken["frozen_ms"]),
        (&json!(2.5), &json!(9.0))
    );
    assert_eq!(taken["snapshot"]["tags"], json!(["first"]));
    assert_eq!(taken["snapshot"]["taken_of"], "notes");
    assert_eq!(taken["snapshot"]["encrypted"], false);

    let ids = bench.ids("first", 3).await;
    let listed = bench.items("/api/v1/sandboxes").await;
    assert_eq!(listed.len(), 3);
    for sandbox in &listed {
        assert_eq!(
            (&sandbox["state"], &sandbox["from"]),
            (&json!("open"), &json!("first"))
        );
        assert_eq!(sandbox["snapshot"], taken["snapshot"]["id"]);
        let hosted = (&sandbox["boundary"], &sandbox["boundary_text"]);
        assert_eq!(hosted, (&json!("none"), &json!("none (sim)")));
    }
    let one = format!("/api/v1/sandboxes/{}", ids[0]);
    let before = bench.ok("GET", &one, None).await;
    let after = bench.ok("POST", &format!("{one}/rollback"), None).await;
    assert_eq!(before["id"], after["id"]);
    assert_ne!(before["vm"], after["vm"], "it is another VM");

    // A checkpoint of a sandbox continues what that began from.
    let deeper = bench
        .checkpoint(&format!("sandboxes/{}", ids[0]), "second")
        .await;
    assert_eq!(deeper["snapshot"]["parent"], taken["snapshot"]["id"]);
    assert_eq!(deeper["snapshot"]["taken_of"], json!(ids[0]));
    let to = json!({"to": "second"});
    let back = bench.ok("POST", &format!("{one}/rollback"), Some(to)).await;
    assert_eq!(back["snapshot"], deeper["snapshot"]["id"]);
    for id in ids {
        bench
            .ok("DELETE", &format!("/api/v1/sandboxes/{id}"), None)
            .await;
    }
    assert_eq!(bench.sandbox_vms(), 0);
    assert_eq!(bench.records(SANDBOXES).await, 0);
    assert_eq!(bench.items("/api/v1/snapshots").await.len(), 2);
    assert_eq!(bench.nodes.running().len(), 1, "the app goes on");
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_answered_when_nothing_is_left_and_not_before() {
    let store = MoodyStore::new();
    let bench = Bench::over(store.clone()).await;
    bench.deploy("notes", |_| {}).await;
    let id = bench.ids("notes", 1).await.remove(0);
    store.holds_removals.send_replace(true);
    let path = format!("/api/v1/sandboxes/{id}");
    let remove = bench.call("DELETE", &path, None);
    let early = tokio::time::timeout(Duration::from_secs(5), remove).await;
    assert!(early.is_err(), "its record is still there");
    store.holds_removals.send_replace(false);
    bench.until_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn a_fork_of_what_runs_takes_its_snapshot_with_it() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let ids = bench.ids("notes", 2).await;
    let nested = bench.ids(&ids[0], 1).await;
    assert_eq!(bench.snapshots().len(), 2);
    for id in ids.iter().chain(&nested) {
        assert_ne!(bench.snapshots().len(), 0);
        bench
            .ok("DELETE", &format!("/api/v1/sandboxes/{id}"), None)
            .await;
    }
    // What continued it went after it, so one may be left to the collection.
    bench.ok("POST", "/api/v1/snapshots/gc", None).await;
    assert_eq!(bench.snapshots(), []);
}

#[tokio::test(start_paused = true)]
async fn foreign_layer_hash_is_not_a_capability() {
    let bench = Bench::with_tag("mine").await;
    let sandbox = bench.ids("mine", 1).await.remove(0);
    let snapshot = bench.snapshots()[0].to_string();
    let (at, of) = (
        format!("/api/v1/snapshots/{snapshot}"),
        format!("/api/v1/sandboxes/{sandbox}"),
    );
    let fork = |from: &str| Some(json!({"from": from}));
    let tag = Some(json!({"tag": "stolen"}));
    let at_compact = format!("{at}/compact");
    let (of_rollback, of_checkpoint) = (format!("{of}/rollback"), format!("{of}/checkpoint"));
    let calls: [(&str, &str, Option<Value>); 16] = [
        ("GET", &at, None),
        ("DELETE", &at, None),
        ("POST", &at_compact, None),
        ("GET", "/api/v1/snapshots/mine", None),
        ("DELETE", "/api/v1/snapshots/mine?cascade=true", None),
        ("POST", "/api/v1/forks", fork(&snapshot)),
        ("POST", "/api/v1/forks", fork(&sandbox)),
        ("POST", "/api/v1/forks", fork("mine")),
        ("POST", "/api/v1/forks", fork("tag:mine")),
        ("POST", "/api/v1/forks", fork("notes")),
        ("POST", "/api/v1/forks", fork("app:notes")),
        ("POST", "/api/v1/apps/notes/checkpoint", tag.clone()),
        ("POST", &of_checkpoint, tag),
        ("GET", &of, None),
        ("DELETE", &of, None),
        ("POST", &of_rollback, None),
    ];
    for (method, path, body) in calls {
        let answer = bench.send(yours(method, path, body.clone())).await;
        assert_eq!(
            found(&answer),
            (404, "not_found".to_owned()),
            "{method} {path} {body:?}"
        );
    }
    for path in ["/api/v1/snapshots", "/api/v1/sandboxes"] {
        let items = bench.send(yours("GET", path, None)).await;
        assert_eq!(items.json()["items"], json!([]), "{path}");
    }
    let gc = bench
        .send(yours("POST", "/api/v1/snapshots/gc", None))
        .await;
    assert_eq!(found(&gc), (403, "forbidden".to_owned()));

    // Not even a sandbox of your own goes to a snapshot of mine.
    let public: SnapshotId = snapshot.parse().unwrap();
    let change = |account: &'static str| {
        let mut state = bench.nodes.state.lock().unwrap();
        state
            .snapshots
            .change(public, |info| info.account = account.to_owned());
    };
    bench
        .checkpoint(&format!("sandboxes/{sandbox}"), "other")
        .await;
    change("public");
    let record = TagRecord {
        snapshot: public,
        created_at_ms: 0,
    };
    let public_tag = tag_key(&"public".parse().unwrap(), &"base".parse().unwrap());
    let write = Transaction::default().put(public_tag, encode(&record));
    bench.store.commit(write).await.unwrap();
    let forked = bench
        .send(yours("POST", "/api/v1/forks", fork("base")))
        .await;
    let own = forked.json()[0]["id"].as_str().unwrap().to_owned();
    let rollback = format!("/api/v1/sandboxes/{own}/rollback");
    let other = bench.ok("GET", "/api/v1/snapshots/other", None).await;
    for to in ["other", other["id"].as_str().unwrap()] {
        let answer = bench
            .send(yours("POST", &rollback, Some(json!({"to": to}))))
            .await;
        assert_eq!(found(&answer), (404, "not_found".to_owned()), "{to}");
    }
    // And the platform's own is there to be forked, not to be changed.
    let removed = bench
        .send(yours("DELETE", "/api/v1/snapshots/base", None))
        .await;
    assert_eq!(found(&removed), (403, "forbidden".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_thousand_forks_are_asked_for_where_twenty_fit() {
    let bench = Bench::with_tag("base").await;
    bench.nodes.state.lock().unwrap().sandboxes_max = Some(20);
    let forks = bench.fork("base", 1000).await;
    assert_eq!(forks.len(), 1000);
    let refused: Vec<_> = forks
        .iter()
        .filter(|fork| fork.get("error").is_some())
        .collect();
    assert_eq!(refused.len(), 980);
    for fork in refused {
        assert_eq!(fork["error"]["code"], "no_capacity");
        let id = fork["id"].as_str().unwrap();
        let shown = bench
            .call("GET", &format!("/api/v1/sandboxes/{id}"), None)
            .await;
        assert_eq!(found(&shown), (404, "not_found".to_owned()));
    }
    assert_eq!(
        (bench.sandbox_vms(), bench.records(SANDBOXES).await),
        (20, 20)
    );
    for fork in bench.items("/api/v1/sandboxes").await {
        let path = format!("/api/v1/sandboxes/{}", fork["id"].as_str().unwrap());
        bench.ok("DELETE", &path, None).await;
    }
    let all = json!({"from": "base", "count": 21, "all_or_nothing": true});
    let answer = bench.call("POST", "/api/v1/forks", Some(all)).await;
    assert_eq!(found(&answer), (503, "no_capacity".to_owned()));
    assert_eq!(
        (bench.sandbox_vms(), bench.records(SANDBOXES).await),
        (0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn one_failure_undoes_a_fork_of_all_or_nothing() {
    let bench = Bench::with_tag("base").await;
    let acts = [Act::Ready(5), Act::Crash, Act::Ready(5)];
    bench.nodes.state.lock().unwrap().sandbox_acts.extend(acts);
    let forks = bench.fork("base", 3).await;
    let failed: Vec<_> = forks
        .iter()
        .map(|fork| fork.get("error").is_some())
        .collect();
    assert_eq!(failed, [false, true, false]);
    assert_eq!(bench.items("/api/v1/sandboxes").await.len(), 2);

    bench.nodes.state.lock().unwrap().sandbox_acts.extend(acts);
    let all = json!({"from": "base", "count": 3, "all_or_nothing": true});
    let (code, message) = bench.refused("/api/v1/forks", all).await;
    assert_eq!(code, "app_failed");
    assert!(message.contains("none is"), "{message}");
    assert_eq!(bench.items("/api/v1/sandboxes").await.len(), 2);
    assert_eq!(bench.sandbox_vms(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_fork_whose_caller_leaves_leaves_nothing() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let acts = [Act::Ready(5), Act::Hang, Act::Ready(900)];
    bench.nodes.state.lock().unwrap().sandbox_acts.extend(acts);
    let body = json!({"from": "notes", "count": 3});
    let fork = bench.call("POST", "/api/v1/forks", Some(body));
    let left = tokio::time::timeout(Duration::from_millis(500), fork).await;
    assert!(
        left.is_err(),
        "the call was over before anybody could leave"
    );
    assert!(bench.sandbox_vms() > 0, "they were started");
    bench.until_nothing().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(bench.snapshots(), [], "what was taken for it goes too");
}

#[tokio::test(start_paused = true)]
async fn what_holds_secrets_is_taken_only_when_asked_and_encrypted() {
    let bench = Bench::new().await;
    let secret = Some(json!({"value": "hunter2-hunter2"}));
    bench
        .ok("PUT", "/api/v1/apps/notes/secrets/TOKEN", secret)
        .await;
    let names = json!({"names": ["TOKEN"]});
    let done = bench
        .deploy("notes", |body| body["spec"]["secrets"] = names)
        .await;
    assert_eq!(done["state"], "succeeded", "{done}");
    let at = "/api/v1/apps/notes/checkpoint";
    for (path, body) in [
        (at, json!({"tag": "safe"})),
        ("/api/v1/forks", json!({"from": "notes"})),
    ] {
        let (code, message) = bench.refused(path, body).await;
        assert_eq!(code, "conflict");
        assert!(message.contains("--allow-secrets"), "{message}");
    }
    assert_eq!(bench.snapshots(), []);
    let allowed = json!({"tag": "safe", "allow_secrets": true});
    let taken = bench.ok("POST", at, Some(allowed)).await;
    assert_eq!(taken["snapshot"]["encrypted"], true);
    // The node is given the key of each that is continued, or it would not start them.
    let ids = bench.ids("safe", 2).await;
    let of = format!("/api/v1/sandboxes/{}/checkpoint", ids[0]);
    let (code, _) = bench.refused(&of, json!({"tag": "deep"})).await;
    assert_eq!(code, "conflict", "it holds what it began from");
    let deep = json!({"tag": "deep", "allow_secrets": true});
    bench.ok("POST", &of, Some(deep)).await;
    bench.ids("deep", 1).await;
    let compacted = bench
        .ok("POST", "/api/v1/snapshots/deep/compact", None)
        .await;
    assert_eq!(
        (&compacted["depth"], compacted.get("parent")),
        (&json!(0), None)
    );
    assert_eq!(bench.records(SNAPSHOT_KEYS).await, 2);
    for sandbox in bench.items("/api/v1/sandboxes").await {
        let path = format!("/api/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
        bench.ok("DELETE", &path, None).await;
    }
    bench.ok("DELETE", "/api/v1/snapshots/deep", None).await;
    bench.ok("DELETE", "/api/v1/snapshots/safe", None).await;
    assert_eq!(bench.records(SNAPSHOT_KEYS).await, 0);
    assert_eq!(bench.records(TAGS).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_goes_only_when_nothing_needs_it() {
    let bench = Bench::with_tag("base").await;
    let id = bench.ids("base", 1).await.remove(0);
    let rm = |name: &str| format!("/api/v1/snapshots/{name}");
    let needed = bench.call("DELETE", &rm("base"), None).await;
    assert_eq!(found(&needed), (409, "conflict".to_owned()));
    assert!(
        needed.json()["message"]
            .as_str()
            .unwrap()
            .contains("spore sandbox ls")
    );
    bench.checkpoint(&format!("sandboxes/{id}"), "child").await;
    bench
        .ok("DELETE", &format!("/api/v1/sandboxes/{id}"), None)
        .await;
    let continued = bench.call("DELETE", &rm("base"), None).await;
    assert_eq!(found(&continued), (409, "conflict".to_owned()));
    let base = bench.ok("GET", &rm("base"), None).await;
    assert_eq!(base["children"].as_array().unwrap().len(), 1);

    // Nothing that is named is collected, and a rehearsal removes nothing.
    for body in [json!({"dry_run": true}), json!({})] {
        let report = bench.ok("POST", "/api/v1/snapshots/gc", Some(body)).await;
        assert_eq!(report["removed"], json!([]));
    }
    let gone = bench
        .ok("DELETE", &format!("{}?cascade=true", rm("base")), None)
        .await;
    assert_eq!(gone["removed"].as_array().unwrap().len(), 2);
    assert_eq!(bench.records(TAGS).await, 0, "their names go with them");
    assert_eq!(bench.items("/api/v1/snapshots").await, Vec::<Value>::new());

    bench.checkpoint("apps/notes", "again").await;
    let unnamed = Transaction::default().delete("tag/me/again");
    bench.store.commit(unnamed).await.unwrap();
    let rehearsed = bench
        .ok(
            "POST",
            "/api/v1/snapshots/gc",
            Some(json!({"dry_run": true})),
        )
        .await;
    assert_eq!(rehearsed["removed"].as_array().unwrap().len(), 1);
    assert_eq!(bench.snapshots().len(), 1);
    bench.ok("POST", "/api/v1/snapshots/gc", None).await;
    assert_eq!(bench.snapshots(), []);
}

#[tokio::test(start_paused = true)]
async fn bad_tags_and_counts_are_refused_with_what_would_be_right() {
    let bench = Bench::with_tag("base").await;
    bench.deploy("base", |_| {}).await;
    let at = "/api/v1/apps/notes/checkpoint";
    for tag in [
        "",
        "A",
        "a b",
        "../x",
        "a--b",
        "abcdefghijklmnopqrstuvwxya",
        "x/y",
    ] {
        let (code, message) = bench.refused(at, json!({"tag": tag})).await;
        assert_eq!(code, "invalid", "{tag}");
        assert!(message.contains("beginning with a letter"), "{message}");
    }
    let (code, message) = bench.refused(at, json!({"tag": "base"})).await;
    assert_eq!(code, "conflict");
    assert!(message.contains("spore snapshot rm base"), "{message}");
    let forks = "/api/v1/forks";
    for (body, code, said) in [
        (
            json!({"from": "tag:base", "count": 0}),
            "invalid",
            "1 to 1000",
        ),
        (
            json!({"from": "tag:base", "count": 1001}),
            "invalid",
            "1 to 1000",
        ),
        (
            json!({"from": "base"}),
            "invalid",
            "`app:base` or `tag:base`",
        ),
        (json!({"from": "nothing"}), "not_found", "spore snapshot ls"),
        (
            json!({"from": "tag:nothing"}),
            "not_found",
            "spore snapshot ls",
        ),
        (
            json!({"from": "abcdefghijklmnopqrstuvwxya"}),
            "not_found",
            "spore sandbox ls",
        ),
        (
            json!({"from": "no/name"}),
            "invalid",
            "`tag:NAME` or `app:NAME`",
        ),
        (json!({"count": 1}), "invalid", "from"),
        (json!({"from": "tag:base", "more": 1}), "invalid", "more"),
    ] {
        let (given, message) = bench.refused(forks, body.clone()).await;
        assert_eq!(given, code, "{body}: {message}");
        assert!(message.contains(said), "{body}: {message}");
    }
    for path in ["/api/v1/sandboxes/short", "/api/v1/snapshots/No%20Tag"] {
        assert_eq!(bench.call("GET", path, None).await.code(), "invalid");
    }
    let id = bench.ids("tag:base", 1).await.remove(0);
    let rollback = format!("/api/v1/sandboxes/{id}/rollback");
    let (code, _) = bench.refused(&rollback, json!({"to": "nothing"})).await;
    assert_eq!(code, "not_found");
    assert_eq!(
        bench.snapshots().len(),
        1,
        "a refused call takes no snapshot"
    );
}

#[tokio::test(start_paused = true)]
async fn a_damaged_snapshot_and_a_refused_checkpoint_say_why() {
    let bench = Bench::with_tag("base").await;
    let id = bench.snapshots()[0];
    let damage = Some("memory chunk 17 is damaged".to_owned());
    let set = |damage| {
        let mut state = bench.nodes.state.lock().unwrap();
        state.snapshots.change(id, |info| info.damage = damage);
    };
    set(damage);
    let forks = bench.fork("base", 2).await;
    for fork in forks {
        assert_eq!(fork["error"]["code"], "snapshot_unusable");
        assert!(
            fork["error"]["message"]
                .as_str()
                .unwrap()
                .contains("memory chunk 17")
        );
    }
    let shown = bench.ok("GET", "/api/v1/snapshots/base", None).await;
    assert_eq!(shown["damage"], "memory chunk 17 is damaged");
    set(None);
    let message = "the app is being checkpointed already".to_owned();
    bench.nodes.state.lock().unwrap().snapshots.refuses = Some(NodesError::Conflict { message });
    let body = json!({"tag": "more"});
    let (code, message) = bench.refused("/api/v1/apps/notes/checkpoint", body).await;
    assert_eq!(code, "conflict");
    assert!(message.contains("already"), "{message}");
    assert_eq!(bench.records(TAGS).await, 1);
}

#[tokio::test(start_paused = true)]
async fn sandboxes_live_through_a_restart_or_are_told_to_have_ended() {
    let bench = Bench::with_tag("base").await;
    let ids = bench.ids("base", 2).await;
    bench
        .nodes
        .state
        .lock()
        .unwrap()
        .sandbox_acts
        .push_back(Act::Hang);
    // The daemon ends while the third is on its way, and its caller waits.
    let fork = request("POST", "/api/v1/forks", Some(json!({"from": "base"})));
    let waits = tokio::spawn(bench.router.clone().oneshot(fork));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.sandbox_vms(), 3);
    let path = format!("/api/v1/sandboxes/{}", ids[1]);
    let lost = bench.ok("GET", &path, None).await;
    bench
        .nodes
        .vanish(lost["vm"].as_str().unwrap().parse().unwrap());
    let bench = bench.again().await;
    let state = async |id: &str| {
        let path = format!("/api/v1/sandboxes/{id}");
        let sandbox = bench.ok("GET", &path, None).await;
        (sandbox["state"].clone(), sandbox.get("boundary").cloned())
    };
    assert_eq!(state(&ids[0]).await, (json!("open"), Some(json!("none"))));
    assert_eq!(state(&ids[1]).await, (json!("ended"), None));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(
        bench.items("/api/v1/sandboxes").await.len(),
        2,
        "nobody waits for the third"
    );
    assert_eq!(bench.sandbox_vms(), 1);
    waits.abort();
    let rollback = format!("/api/v1/sandboxes/{}/rollback", ids[1]);
    assert_eq!(bench.ok("POST", &rollback, None).await["state"], "open");

    // One that dies is told so, and can be had again.
    let one = format!("/api/v1/sandboxes/{}", ids[0]);
    let vm = bench.ok("GET", &one, None).await["vm"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    bench.nodes.die(vm, VmFailureKind::Died);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ended = bench.ok("GET", &one, None).await;
    assert_eq!((&ended["state"], ended.get("vm")), (&json!("ended"), None));
    assert!(
        ended["ended"]
            .as_str()
            .unwrap()
            .contains("ended with code 1")
    );
    bench.ok("DELETE", &one, None).await;
    bench
        .ok("DELETE", &format!("/api/v1/sandboxes/{}", ids[1]), None)
        .await;
    bench.until_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn only_so_many_forks_of_an_account_are_under_way() {
    let bench = Bench::with_tag("base").await;
    bench
        .nodes
        .state
        .lock()
        .unwrap()
        .sandbox_acts
        .extend([Act::Ready(60_000); 4]);
    let fork = || {
        let body = Some(json!({"from": "base"}));
        bench.call("POST", "/api/v1/forks", body)
    };
    let four = async { tokio::join!(fork(), fork(), fork(), fork()) };
    let fifth = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        fork().await
    };
    let (four, fifth) = tokio::join!(four, fifth);
    assert_eq!(found(&fifth), (429, "too_many_requests".to_owned()));
    assert!(four.0.status.is_success() && four.3.status.is_success());
    assert!(
        fork().await.status.is_success(),
        "a turn that is over is free again"
    );
}
