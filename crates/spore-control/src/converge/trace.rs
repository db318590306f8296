//! Follows a start through the log: the span that its lines stand in, from the request that asked
//! for it to what it came to. Kept by each app's slot; nothing is decided by it.

use spore_wire::gateway::Phase;
use spore_wire::id::{TraceId, VmId};
use tracing::Span;
use tracing::field::display;

use super::AppRef;

/// The start of an app's VM that is under way, as the log shows it.
#[derive(Debug, Default)]
pub(super) struct StartTrace {
    asked: Option<TraceId>,
    under_way: Option<(VmId, Span)>,
}

impl StartTrace {
    /// A request asks for the next start.
    pub(super) const fn asked_by(&mut self, trace: Option<TraceId>) {
        self.asked = trace;
    }

    /// A start begins; answers the request that it is for, and the span of everything done for it.
    pub(super) fn begin(
        &mut self,
        app: &AppRef,
        vm: VmId,
        release: u64,
    ) -> (Option<TraceId>, Span) {
        let trace = self.asked.take();
        let shown = trace.as_ref().map(display);
        let span = tracing::info_span!("start", %app, %vm, release, trace = shown);
        self.under_way = Some((vm, span.clone()));
        (trace, span)
    }

    /// The VM serves.
    pub(super) fn awake(&mut self, vm: VmId, phases: &[Phase]) {
        self.asked = None;
        let Some((_, span)) = self.under_way.take_if(|(begun, _)| *begun == vm) else {
            return;
        };
        let took: Vec<String> = phases
            .iter()
            .map(|phase| format!("{} {} ms", phase.name, phase.us / 1000))
            .collect();
        tracing::info!(parent: &span, took = took.join(", "), "awake");
    }

    /// It came to nothing.
    pub(super) fn failed(&mut self, code: &str, message: &str) {
        self.asked = None;
        let span = self
            .under_way
            .take()
            .map_or_else(Span::none, |(_, span)| span);
        tracing::info!(parent: &span, code, message, "not awake");
    }
}
