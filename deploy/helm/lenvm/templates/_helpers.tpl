{{- define "lenvm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "lenvm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "lenvm.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lenvm.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "lenvm.selector" -}}
app.kubernetes.io/name: {{ include "lenvm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lenvm.labels" -}}
{{ include "lenvm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lenvm.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "lenvm.secretName" -}}
{{- default (printf "%s-secrets" (include "lenvm.fullname" .)) .Values.secrets.existing -}}
{{- end -}}

{{- /* Numbers come as floats: 2097152 would be written 2.097152e+06, which is no integer to the service. */ -}}
{{- define "lenvm.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- /* From SIGTERM on the process takes at most the longer of both, and up to three seconds to close connections. */ -}}
{{- define "lenvm.gracePeriod" -}}
{{- $drain := max (ceil (default 30 .Values.settings.drain_timeout_s)) (ceil (default 0.5 .Values.settings.drain_grace_s)) -}}
{{- add (ceil .Values.preStopSeconds) $drain 10 -}}
{{- end -}}

{{- define "lenvm.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
